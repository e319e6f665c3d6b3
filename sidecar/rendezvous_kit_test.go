// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// meeting is a wire whose legs meet in a room that is minted here.
type meeting struct{ rooms *atomic.Int64 }

func (m meeting) Prefill(x *connectors.Exchange, body *inference.Edits) {
	connectors.OneToken(x.Request, body)
	x.Ticket = "room-" + strconv.FormatInt(m.rooms.Add(1), 10)
	body.Set("room", []byte(`"`+x.Ticket+`"`))
}

func (meeting) Answer(_ *connectors.Exchange, answer []byte) connectors.Answer {
	switch {
	case bytes.Contains(answer, []byte("panic")):
		panic("a connector's bug")
	case bytes.Contains(answer, []byte("abort")):
		return connectors.Answer{Verdict: connectors.Failed, CachedTokens: -1}
	case bytes.Contains(answer, []byte("ended by itself")):
		return connectors.Answer{Verdict: connectors.Complete, CachedTokens: -1}
	case !bytes.HasPrefix(answer, []byte("{")):
		return connectors.Answer{Verdict: connectors.Malformed, CachedTokens: -1}
	}
	return connectors.Answer{PromptTokens: 77, CachedTokens: 33}
}

func (meeting) Decode(x *connectors.Exchange, handle []byte, body *inference.Edits) {
	if handle != nil {
		panic("a rendezvous has no handle")
	}
	body.Set("room", []byte(`"`+x.Ticket+`"`))
	body.Set("from", []byte(`"`+x.Prefiller.Name+`"`))
}

func (meeting) Withdraw(x *connectors.Exchange, body *inference.Edits) {
	if x.Request.Body.Len == 0 {
		panic("withdraws from a body that is not there")
	}
	body.Remove("room")
	body.Remove("from")
}

func (meeting) Abort(x *connectors.Exchange) (path string, body []byte) {
	return "/abort_request", []byte(`{"rid":"` + x.Ticket + `"}`)
}

// waiting is a wire like SGLang's: decode cannot go on alone, and is ended when its prefill failed. helping is one whose
// decode helps itself.
func waiting() connectors.Traits {
	return connectors.Traits{
		Name: "waiting", Shape: connectors.Rendezvous, Claims: true, EndsDecode: true, APIs: []inference.API{inference.Completions},
	}
}

func helping() connectors.Traits {
	t := waiting()
	t.Name, t.Aggregates, t.EndsDecode = "helping", true, false
	return t
}

// seen is what a server got.
type seen struct {
	mu     sync.Mutex
	bodies []string
	heads  []http.Header
	paths  []string
}

func (s *seen) note(req *http.Request) string {
	b, _ := io.ReadAll(req.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bodies, s.heads, s.paths = append(s.bodies, string(b)), append(s.heads, req.Header), append(s.paths, req.URL.Path)
	return string(b)
}

func (s *seen) all() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.bodies, " ")
}

// party is a rig with a wire and a decode endpoint that records.
type party struct {
	*rig
	d       *pool.Endpoint
	decoded *seen
	gone    atomic.Int64 // prefills whose request was cancelled
}

func newParty(t *testing.T, traits connectors.Traits, change func(*config.Disaggregation)) *party {
	t.Helper()
	p := &party{rig: newRig(t, change), decoded: new(seen)}
	p.settings.Load().wires[""] = wire{meeting{new(atomic.Int64)}, traits}
	p.d = p.server("d", func(_ http.ResponseWriter, req *http.Request) { p.decoded.note(req) })
	p.d.Role = pool.RoleDecode
	return p
}

// holding is a prefill endpoint that answers when it is told to, with a status and a body.
func (p *party) holding(name string) (*pool.Endpoint, chan<- string, *seen) {
	say, got := make(chan string, 1), new(seen)
	e := p.server(name, func(w http.ResponseWriter, req *http.Request) {
		got.note(req)
		select {
		case what := <-say:
			respond(w, what)
		case <-req.Context().Done():
			p.gone.Add(1)
		}
	})
	return e, say, got
}

// respond answers with "<status> <body>", or breaks the connection.
func respond(w http.ResponseWriter, what string) {
	code, body, _ := strings.Cut(what, " ")
	n, err := strconv.Atoi(code)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.WriteHeader(n)
	_, _ = io.WriteString(w, body)
}

// begin runs a job up to the point where its leg is under way and decode is forwarded.
func (p *party) begin(prefillers ...*pool.Endpoint) (*Job, *Outcome) {
	p.t.Helper()
	j := p.job(inference.Completions, clientBody, p.d, prefillers...)
	out, err := p.Run(p.t.Context(), j)
	if err != nil {
		p.t.Fatal(err)
	}
	if out.leg == nil || out.Checkpoint != PrefillSelected || out.Name != "disaggregated" || !out.Bound() || !out.Overlaps() {
		p.t.Fatalf("%+v", out)
	}
	return j, out
}

func (p *party) forward(prefillers ...*pool.Endpoint) (*Job, *Outcome) {
	p.t.Helper()
	j, out := p.begin(prefillers...)
	if err := p.Forward(p.t.Context(), j, out, p.d); err != nil || out.Checkpoint != DecodeForwarded {
		p.t.Fatalf("%+v, %v", out, err)
	}
	p.forgetBody(j)
	return j, out
}

// forgetBody does what the director does once the request was sent on.
func (p *party) forgetBody(j *Job) { j.Body, j.Request.Body = nil, inference.Body{} }

// over waits for the leg, and checks that nothing of it is left.
func (p *party) over(out *Outcome) {
	p.t.Helper()
	<-out.Pending()
	p.background.Wait()
	p.idle()
}

// aborts compares what the decode endpoint was told.
func (p *party) aborts(want string) {
	p.t.Helper()
	p.background.Wait()
	if got := p.decoded.all(); got != want {
		p.t.Errorf("decode was told %q, want %q", got, want)
	}
	n := 0.0
	if want != "" {
		n = 1
	}
	p.want(n, "aborts_total")
}

func newRooms() *atomic.Int64 { return new(atomic.Int64) }
