// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// route is what one path answers.
type route struct {
	method string // besides HEAD for GET
	api    api
	serve  func(p *process, x *exchange)
}

// routeOf finds the handler of a path; nil for an unknown one.
func routeOf(path string) *route {
	switch path {
	case "/v1/completions":
		return &route{http.MethodPost, apiCompletions, (*process).generate}
	case "/v1/chat/completions":
		return &route{http.MethodPost, apiChat, (*process).generate}
	case "/v1/responses":
		return &route{http.MethodPost, apiResponses, (*process).generate}
	case "/v1/messages":
		return &route{http.MethodPost, apiMessages, (*process).generate}
	case "/inference/v1/generate":
		return &route{http.MethodPost, apiGenerate, (*process).generate}
	case "/v1/completions/render", "/v1/chat/completions/render":
		return &route{http.MethodPost, apiCompletions, (*process).serveScaleOutOff}
	case "/v1/messages/count_tokens":
		return &route{http.MethodPost, apiMessages, (*process).serveCountTokens}
	case "/tokenize":
		return &route{http.MethodPost, apiCompletions, (*process).serveTokenize}
	case "/detokenize":
		return &route{http.MethodPost, apiCompletions, (*process).serveDetokenize}
	case "/reset_prefix_cache":
		return &route{http.MethodPost, apiCompletions, (*process).serveResetCache}
	case "/v1/models":
		return &route{http.MethodGet, apiCompletions, (*process).serveModels}
	case "/health", "/ping":
		return &route{http.MethodGet, apiCompletions, (*process).serveHealth}
	case "/version":
		return &route{http.MethodGet, apiCompletions, (*process).serveVersion}
	case "/load":
		return &route{http.MethodGet, apiCompletions, (*process).serveLoad}
	case "/metrics", "/metrics/":
		return &route{http.MethodGet, apiCompletions, (*process).serveMetrics}
	case "/admin/faults":
		return &route{"", apiCompletions, (*process).serveFaults}
	case "/admin/kill":
		return &route{http.MethodPost, apiCompletions, (*process).serveKill}
	case "/admin/state":
		return &route{http.MethodGet, apiCompletions, (*process).serveState}
	}
	return nil
}

// exchange is one request with its answer.
type exchange struct {
	w     http.ResponseWriter
	r     *http.Request
	api   api
	call  *call
	fault *Fault // to inject, nil for none
}

func (p *process) serveHTTP(w http.ResponseWriter, r *http.Request) {
	p.work.Add(1)
	defer p.work.Done()
	h := w.Header()
	h["Server"] = []string{"uvicorn"}
	h["Vary"] = []string{"Origin"}
	x := &exchange{w: w, r: r}
	if p.e.opts.RequestIDHeader {
		id := r.Header.Get(headerRequestID)
		if id == "" {
			id = p.e.hex(16)
		}
		h.Set(headerRequestID, id)
	}
	rt := routeOf(r.URL.Path)
	switch {
	case rt == nil && strings.HasSuffix(r.URL.Path, "/") && routeOf(strings.TrimRight(r.URL.Path, "/")) != nil:
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

func (x *exchange) fail(err *apiError) { x.json(err.status, err.body(x.api)) }

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
	c, bad := p.e.parse(x.api, x.r.Header, body)
	rec := Recorded{
		At: time.Now(), Method: x.r.Method, URI: x.r.RequestURI, Header: x.r.Header.Clone(), Body: body,
		RequestID: x.r.Header.Get(headerRequestID), Attempt: x.r.Header.Get(headerAttempt), Phase: phasePlain,
	}
	if c != nil {
		rec.Phase = c.phase
	}
	p.e.records.body(rec)
	x.call = c
	x.fault = p.e.faults.pick(p.e, c)
	if x.fault != nil && !x.fault.Late && p.injectEarly(x) {
		return
	}
	if bad != nil {
		if c != nil && c.phase == phaseTransfer {
			p.e.letGo(c.transfer)
		}
		x.fail(bad)
		return
	}
	p.answer(x, p.newGroup(c))
}

// answer runs g and writes the answer, streamed or whole.
func (p *process) answer(x *exchange, g *group) {
	c := x.call
	out := newWriter(p, x, g)
	var emit emitter = func(*sequence, uint32, string) error { return nil }
	if p.full(g) { // before a stream's headers
		p.e.letGo(g.remote)
		p.answerError(x, out, errQueueFull)
		return
	}
	if c.stream {
		if err := out.begin(); err != nil {
			return
		}
		emit = out.token
	}
	err := p.run(x.r.Context(), c, g, emit)
	if err != nil {
		p.answerError(x, out, err)
		return
	}
	if x.fault != nil && x.fault.Kind == faultFinishError {
		for _, q := range g.seqs {
			q.finish, q.stopReason = finishError, ""
		}
	}
	handle := p.finish(x, g)
	if x.fault != nil && x.fault.Late && p.injectEarly(x) {
		return
	}
	if c.stream {
		out.end()
		return
	}
	x.answerJSON(out.whole(handle))
}

// finish pins or frees the blocks of a complete answer.
func (p *process) finish(x *exchange, g *group) []byte {
	c := x.call
	var handle []byte
	if c.holds() {
		handle = p.pin(g, c, x.oddHandle)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.meter.finished(g, "")
	p.leave(g)
	return handle
}

// answerError says what went wrong, and lets the engine die of it where a real one would.
func (p *process) answerError(x *exchange, out *writer, err error) {
	if errors.Is(err, errClientGone) {
		return
	}
	bad := errInternal
	died, dies := errors.AsType[*diedError](err)
	switch {
	case dies:
		bad = errDead
		x.w.Header().Set("Connection", "close")
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
