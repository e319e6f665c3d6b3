// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/internal/pooltest"
)

// rendezvous is a kit whose prefills run beside decode, between servers that the test plays.
type rendezvous struct {
	*kit
	say     chan string   // what the prefill endpoint answers, as "status body"
	gone    atomic.Int64  // prefills that were cancelled
	aborted chan string   // what decode was told to abort
	begun   chan struct{} // the prefill request has arrived
}

func newRendezvous(t *testing.T, disaggregation string) *rendezvous {
	t.Helper()
	r := &rendezvous{say: make(chan string, 1), aborted: make(chan string, 10), begun: make(chan struct{}, 10)}
	prefill := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		r.begun <- struct{}{}
		select {
		case what := <-r.say:
			code, body, _ := strings.Cut(what, " ")
			n, _ := strconv.Atoi(code)
			w.WriteHeader(n)
			_, _ = io.WriteString(w, body)
		case <-req.Context().Done():
			r.gone.Add(1)
		}
	}))
	decode := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		r.aborted <- req.URL.Path + " " + string(b)
	}))
	t.Cleanup(prefill.Close)
	t.Cleanup(decode.Close)
	r.kit = newKit(t, kitOptions{
		config: prefillConfig + disaggregation,
		snapshot: pooltest.Snapshot(
			pooltest.E("p").Role("prefill").Addr(prefill.Listener.Addr().String()),
			pooltest.E("d").Role("decode").Addr(decode.Listener.Addr().String()),
		),
	})
	return r
}

const sglang = "disaggregation: {mode: orchestrate, kvConnector: sglang}\n"

// forwarded brings a request to the point where decode has it and prefill runs.
func (r *rendezvous) forwarded(request, response procv3.ProcessingMode_BodySendMode) *call {
	r.t.Helper()
	c := r.open()
	f := first{modes: modesOf(request, response), headers: []string{"x-request-id", "req-7"}}
	var body []byte
	if request == modeBuffered {
		c.send(f.message(r.t))
		if c.recv().GetRequestHeaders() == nil {
			r.t.Fatal("want the headers to pass")
		}
		c.send(bodyMessage([]byte(chat), true))
		if c.recv().GetOverrideMessageTimeout() == nil {
			r.t.Fatal("want time for the prefill")
		}
		m := c.recv()
		body = readMutation(r.t, m, m.GetRequestBody().GetResponse()).body
	} else {
		_, body = c.duplex(f, []byte(chat))
	}
	if !strings.Contains(string(body), `"bootstrap_room"`) && !strings.Contains(string(body), `"kv_transfer_params"`) {
		r.t.Fatalf("decode gets %s", body)
	}
	<-r.begun
	if n := inFlight(r.snapshot); n != 2 {
		r.t.Errorf("%d in flight while both legs run, want 2", n)
	}
	return c
}

// closed waits for the end of everything, and returns the record.
func (r *rendezvous) closed() *director.Record {
	r.t.Helper()
	rec := <-r.records
	eventually(r.t, "released", func() bool { return inFlight(r.snapshot) == 0 && r.server.Streams() == 0 && r.gate.Held() == 0 })
	return rec
}

func (r *rendezvous) told(want bool) {
	r.t.Helper()
	if !want {
		select {
		case what := <-r.aborted:
			r.t.Errorf("decode was told %s", what)
		default:
		}
		return
	}
	if what := <-r.aborted; !strings.HasPrefix(what, `/abort_request {"rid":"req-7-`) {
		r.t.Errorf("decode was told %s", what)
	}
}

var everyMode = map[string][2]procv3.ProcessingMode_BodySendMode{
	"quiet": {modeDuplex, modeNone}, "full duplex": {modeDuplex, modeDuplex}, "streamed response": {modeDuplex, modeStreamed},
	"buffered": {modeBuffered, modeNone}, "buffered both": {modeBuffered, modeBuffered},
}

// TestPrefillBesideDecodeFails takes the request back while decode is waited for (docs/design.md 3.5).
func TestPrefillBesideDecodeFails(t *testing.T) {
	for name, modes := range everyMode {
		t.Run(name, func(t *testing.T) {
			r := newRendezvous(t, sglang)
			c := r.forwarded(modes[0], modes[1])
			r.say <- "500 {}"
			im := c.refused()
			if im.GetStatus().GetCode() != 502 || !strings.Contains(string(im.GetBody()), `"code":502`) {
				t.Errorf("%v", im)
			}
			reason := ""
			for _, h := range im.GetHeaders().GetSetHeaders() {
				if h.GetHeader().GetKey() == HeaderReason {
					reason = headerValue(h.GetHeader())
				}
			}
			if reason != "prefill-failed" {
				t.Errorf("reason %q", reason)
			}
			rec := r.closed()
			if len(rec.Attempts) != 1 || rec.Attempts[0].Reason != "status_5xx" || rec.Error == "" {
				t.Errorf("%+v", rec)
			}
			r.told(true)
			r.told(false)
		})
	}
}

// TestPrefillBesideDecodeSucceeds: nothing of it is seen.
func TestPrefillBesideDecodeSucceeds(t *testing.T) {
	for name, modes := range everyMode {
		t.Run(name, func(t *testing.T) {
			r := newRendezvous(t, sglang)
			c := r.forwarded(modes[0], modes[1])
			r.say <- `200 {"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":7}}`
			eventually(t, "prefill over", func() bool { return r.snapshot.Endpoints[0].Load.Requests() == 0 })
			c.send(responseHeadersMessage("200", ""))
			set := c.recv().GetResponseHeaders().GetResponse().GetHeaderMutation().GetSetHeaders()
			if len(set) != 1 || headerValue(set[0].GetHeader()) != "disaggregated" {
				t.Errorf("%v", set)
			}
			if err := c.stream.CloseSend(); err != nil {
				t.Fatal(err)
			}
			c.ended()
			if rec := r.closed(); len(rec.Attempts) != 1 || rec.Attempts[0].Reason != "ok" || rec.Checkpoint != "TRANSFER_COMPLETE" || rec.Error != "" {
				t.Errorf("%+v", rec)
			}
			r.told(false)
		})
	}
}

// TestPrefillBesideDecodeFailsLate: the response has begun, so it can only be cut.
func TestPrefillBesideDecodeFailsLate(t *testing.T) {
	for name, modes := range everyMode {
		t.Run(name, func(t *testing.T) {
			r := newRendezvous(t, sglang)
			c := r.streamed(modes)
			c.send(responseHeadersMessage("200", ""))
			if modes[1] != modeNone { // a quiet gateway counts the wait, so the head goes on by itself
				c.send(responseBodyMessage([]byte("data: {}\n\n"), false))
			}
			if c.recv().GetResponseHeaders() == nil {
				t.Fatal("want the header answer")
			}
			r.say <- "500 {}"
			var err error
			for err == nil {
				_, err = c.stream.Recv()
			}
			if grpcstatus.Code(err) != codes.Aborted {
				t.Errorf("%v", err)
			}
			r.closed()
			<-r.aborted
		})
	}
}

// streamed sends a streamed request whose prefill has begun.
func (r *rendezvous) streamed(modes [2]procv3.ProcessingMode_BodySendMode) *call {
	c := r.open()
	body := []byte(strings.Replace(chat, "{", `{"stream":true,`, 1))
	if modes[0] == modeBuffered {
		c.send(first{modes: modesOf(modes[0], modes[1])}.message(r.t))
		c.recv()
		c.send(bodyMessage(body, true))
		c.recv()
		c.recv()
	} else {
		c.duplex(first{modes: modesOf(modes[0], modes[1])}, body)
	}
	<-r.begun
	return c
}

// TestHeadOfAStreamWaitsForPrefill: decode sends its head at once, and a prefill that fails then is still a 502.
func TestHeadOfAStreamWaitsForPrefill(t *testing.T) {
	for name, modes := range everyMode {
		t.Run(name, func(t *testing.T) {
			r := newRendezvous(t, sglang)
			r.hold.Store(int64(time.Minute))
			c := r.streamed(modes)
			c.send(responseHeadersMessage("200", ""))
			r.say <- "500 {}"
			m := c.recv().GetImmediateResponse()
			if m.GetStatus().GetCode() != 502 {
				t.Fatalf("want 502, got %v", m)
			}
			c.ended()
			r.closed()
			<-r.aborted
		})
	}
}

// TestDecodeHelpsItself: a failed prefill shows in the outcome only.
func TestDecodeHelpsItself(t *testing.T) {
	r := newRendezvous(t, "disaggregation: {mode: orchestrate, kvConnector: offloading, parallelLegs: true}\n")
	c := r.forwarded(modeDuplex, modeNone)
	r.say <- "500 {}"
	eventually(t, "prefill over", func() bool { return r.snapshot.Endpoints[0].Load.Requests() == 0 })
	settled := func() bool { return len(gathered(t, r.kit, "baton_sidecar_fallbacks_total")) > 0 }
	eventually(t, "settled", settled)
	c.send(responseHeadersMessage("200", ""))
	set := c.recv().GetResponseHeaders().GetResponse().GetHeaderMutation().GetSetHeaders()
	if len(set) != 1 || headerValue(set[0].GetHeader()) != "fallback-status_5xx" {
		t.Errorf("%v", set)
	}
	if err := c.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.ended()
	if rec := r.closed(); rec.Outcome != "fallback-status_5xx" || rec.Picks["prefill"] != "" {
		t.Errorf("%+v", rec)
	}
}

// gathered are the series of a family that are not zero.
func gathered(t *testing.T, k *kit, name string) (series []float64) {
	t.Helper()
	families, err := k.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetCounter().GetValue() > 0 {
				series = append(series, m.GetCounter().GetValue())
			}
		}
	}
	return series
}

// TestClientLeavesWhileBothLegsRun frees prefill and decode where the gateway shows that it is over; where the stream
// only ends, the prefill runs on.
func TestClientLeavesWhileBothLegsRun(t *testing.T) {
	r := newRendezvous(t, sglang)
	c := r.forwarded(modeDuplex, modeNone)
	if err := c.stream.CloseSend(); err != nil { // in quiet mode Envoy says so, too, when the client leaves
		t.Fatal(err)
	}
	c.ended()
	r.closed()
	r.told(true)
	eventually(t, "prefill cancelled", func() bool { return r.gone.Load() == 1 })

	r = newRendezvous(t, sglang)
	c = r.forwarded(modeDuplex, modeNone)
	c.cancel() // what a gateway without a response phase does
	<-r.records
	prefill, decode := &r.snapshot.Endpoints[0].Load, &r.snapshot.Endpoints[1].Load
	if prefill.Requests() != 1 || decode.Requests() != 1 || r.gone.Load() != 0 {
		t.Errorf("%d prefills, %d decodes, %d cancelled", prefill.Requests(), decode.Requests(), r.gone.Load())
	}
	r.say <- "500 {}"
	r.told(true) // nobody can be answered: decode is told all the same
	eventually(t, "released", func() bool { return prefill.Requests() == 0 })
}

// TestDecodeRefuses: an error of the decode server reaches the client, and prefill need not wait for it.
func TestDecodeRefuses(t *testing.T) {
	for _, status := range []string{"400", "404", "503"} {
		r := newRendezvous(t, sglang)
		c := r.forwarded(modeDuplex, modeNone)
		c.send(responseHeadersMessage(status, ""))
		if c.recv().GetResponseHeaders() == nil {
			t.Fatal("want the header answer")
		}
		eventually(t, "prefill cancelled", func() bool { return r.gone.Load() == 1 })
		if err := c.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		c.ended()
		if rec := r.closed(); rec.Status == 0 || len(rec.Attempts) != 1 || rec.Attempts[0].Reason != "canceled" {
			t.Errorf("%+v", rec)
		}
		r.told(false)
	}
}

func responseBodyMessage(chunk []byte, over bool) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{ResponseBody: &extprocv3.HttpBody{Body: chunk, EndOfStream: over}}}
}
