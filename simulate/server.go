// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// exchange is one request with its answer.
type exchange struct {
	p     *process
	w     http.ResponseWriter
	r     *http.Request
	api   api
	call  *call
	fault *Fault          // to inject, nil for none
	ctx   context.Context //nolint:containedctx // of the work, as r's is of the client; nil where they are one
}

func (p *process) serveHTTP(w http.ResponseWriter, r *http.Request) {
	p.work.Add(1)
	defer p.work.Done()
	h := w.Header()
	h["Server"] = []string{"uvicorn"}
	h["Vary"] = []string{"Origin"}
	x := &exchange{p: p, w: w, r: r}
	if p.e.opts.RequestIDHeader {
		id := r.Header.Get(headerRequestID)
		if id == "" {
			id = p.e.hex(16)
		}
		h.Set(headerRequestID, id)
	}
	rt := p.routeOf(r.URL.Path)
	switch {
	case r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != "":
		x.refusePreflight()
	case rt == nil && strings.HasSuffix(r.URL.Path, "/") && p.routeOf(strings.TrimRight(r.URL.Path, "/")) != nil:
		x.redirect()
	case rt == nil:
		x.json(http.StatusNotFound, []byte(`{"detail":"Not Found"}`))
	case rt.method != "" && r.Method != rt.method && (rt.method != http.MethodGet || r.Method != http.MethodHead):
		h.Set("Allow", rt.method)
		x.json(http.StatusMethodNotAllowed, []byte(`{"detail":"Method Not Allowed"}`))
	default:
		x.api = rt.api
		rt.serve(p, x)
	}
}

// redirect drops the slash at the path's end, as Starlette does.
func (x *exchange) redirect() {
	to := "http://" + x.r.Host + strings.TrimRight(x.r.URL.Path, "/")
	if q := x.r.URL.RawQuery; q != "" {
		to += "?" + q
	}
	x.w.Header().Set("Location", to)
	x.w.Header().Set("Content-Length", "0")
	x.w.WriteHeader(http.StatusTemporaryRedirect)
}

// json answers a whole JSON body.
func (x *exchange) json(status int, body []byte) {
	h := x.w.Header()
	if h.Get("Content-Type") == "" {
		h["Content-Type"] = []string{"application/json"}
	}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	x.w.WriteHeader(status)
	_, _ = x.w.Write(body) // a client that is gone is noticed by its context
}

func (x *exchange) fail(err *apiError) { x.json(err.status, x.errorBody(err)) }

// conn is the request's connection.
func (x *exchange) conn() net.Conn {
	c, _ := x.r.Context().Value(connKey{}).(net.Conn)
	return c
}

// hangUp resets the connection.
func (x *exchange) hangUp() {
	hj, ok := x.w.(http.Hijacker)
	if !ok {
		return
	}
	if c, _, err := hj.Hijack(); err == nil {
		reset(c)
	}
}

// readBody reads the whole request; false when the client left meanwhile.
func (x *exchange) readBody() ([]byte, bool) {
	if n := x.r.ContentLength; n > 0 && n < 1<<28 {
		body := make([]byte, n)
		_, err := io.ReadFull(x.r.Body, body)
		return body, err == nil
	}
	body, err := io.ReadAll(x.r.Body)
	return body, err == nil
}

// generate serves every generation API.
func (p *process) generate(x *exchange) {
	body, ok := x.readBody()
	if !ok {
		return
	}
	if x.api == apiGenerate && !p.e.opts.ScaleOut {
		p.serveScaleOutOff(x)
		return
	}
	p = p.rankFor(x.r.Header)
	c, bad := p.e.parse(x.api, x.r.Header, body)
	if refused := p.readLeg(c); bad == nil {
		bad = refused
	}
	if bad == nil {
		bad = p.prepareMedia(c)
	}
	if p.received(x, c, body) {
		c.forsake()
		return
	}
	if bad != nil {
		if c != nil && c.phase == phaseTransfer {
			p.e.letGo(c.transfer)
		}
		c.forsake()
		x.fail(bad)
		return
	}
	c.fields, c.extra = nil, nil
	if w := sglangOf(p); w != nil {
		ctx, end := w.flights.track(x.r.Context(), c)
		defer end()
		x.ctx = ctx
	}
	p.answer(x, p.newGroup(c))
}

// answer runs g and writes the answer, streamed or whole.
func (p *process) answer(x *exchange, g *group) {
	c := x.call
	g.fault = x.fault
	out := newWriter(p, x, g)
	var emit emitter = func(*sequence, uint32, string) error { return nil }
	if p.full(g) { // before a stream's headers
		p.e.letGo(g.remote)
		c.forsake()
		p.answerError(x, out, errQueueFull)
		return
	}
	if c.stream {
		if err := out.begin(); err != nil {
			p.e.letGo(g.remote)
			c.forsake()
			return
		}
		emit = out.token
	}
	err := p.run(x.context(), c, g, emit)
	if errors.Is(err, errCacheThreshold) {
		p.belowThreshold(x, out, g)
		return
	}
	if err != nil {
		p.answerError(x, out, err)
		return
	}
	if x.fault != nil && x.fault.Kind == faultFinishError {
		for _, q := range g.seqs {
			q.finish, q.stopReason = finishError, ""
		}
	}
	handle, err := p.finish(x, g)
	if err != nil {
		p.answerError(x, out, err)
		return
	}
	out.encodings = p.pinEncodings(x, c)
	if x.fault != nil && x.fault.Late && p.injectEarly(x) {
		return
	}
	if c.stream {
		out.end()
		return
	}
	x.answerJSON(x.shaped(out, g, handle))
}

// shaped is the whole answer with what the request's leg adds to it.
func (x *exchange) shaped(out *writer, g *group, m member) []byte {
	var body []byte
	if g.leg == nil || m.name == memberTransfer {
		body = out.whole(m.value)
	} else {
		body = addMember(out.whole(nil), m.name, m.value)
	}
	if s, ok := g.leg.(shaper); ok {
		body = s.shape(body, x.oddHandle)
	}
	return body
}

// member is what a finished prefill adds to its answer.
type member struct {
	name  string
	value json.RawMessage
}

// finish pins or frees the blocks of a complete answer.
func (p *process) finish(x *exchange, g *group) (member, error) {
	c := x.call
	var m member
	switch {
	case g.leg != nil:
		p.mu.Lock()
		if g.leg.phase() == phasePrefill { // whoever waits to be fetched from does so outside the batch
			p.unplace(g)
			p.admit()
			g.state = stateHandover
		}
		p.mu.Unlock()
		var err error
		if m.name, m.value, err = g.leg.done(x.context(), g); err != nil {
			p.ended(g, err)
			return m, err
		}
		if m.name != "" {
			m.value = x.oddHandle(m.value)
		}
	case c.holds():
		m.value = p.pin(g, c, x.oddHandle)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.meter.finished(g, "")
	p.leave(g)
	return m, nil
}

// answerError says what went wrong, and lets the engine die of it where a real one would.
func (p *process) answerError(x *exchange, out *writer, err error) {
	if errors.Is(err, errClientGone) {
		if aborted(x.context()) {
			p.answerAborted(x, out)
		}
		return
	}
	bad := errInternal
	var own *apiError
	died, dies := errors.AsType[*diedError](err)
	switch {
	case dies:
		bad = errDead
		x.w.Header().Set("Connection", "close")
	case errors.As(err, &own):
		bad = own
	case errors.Is(err, errQueueFull):
		bad = &apiError{status: http.StatusServiceUnavailable, kind: "ServiceUnavailableError", message: "The server is overloaded: the waiting queue is full."}
	}
	if x.call.stream && out.begun {
		out.streamError(bad)
	} else {
		x.fail(bad)
	}
	if dies {
		_ = http.NewResponseController(x.w).Flush() // the client may have left
		p.e.die(p, x.conn(), x.call.id, died.reason)
	}
}
