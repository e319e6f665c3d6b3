// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"strconv"
	"testing"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
)

// eventually polls until the condition holds or a minute is over.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func inFlight(s *pool.Snapshot) (n int64) {
	for _, e := range s.Endpoints {
		n += e.Load.Requests()
	}
	return n
}

func TestQuietModeReleasesAtTheEnd(t *testing.T) { // docs/design.md 5.1, second row
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.duplex(first{modes: modesOf(modeDuplex, modeNone)}, []byte(chat))
	if n := inFlight(k.snapshot); n != 1 {
		t.Fatalf("%d in flight while waiting, want 1", n)
	}
	call.send(responseHeadersMessage("200", ""))
	m := call.recv()
	set := m.GetResponseHeaders().GetResponse().GetHeaderMutation().GetSetHeaders()
	if len(set) != 1 || headerValue(set[0].GetHeader()) != "aggregated" {
		t.Errorf("want %s: aggregated, got %v", HeaderOutcome, set)
	}
	if n := inFlight(k.snapshot); n != 1 {
		t.Fatalf("%d in flight while the response runs, want 1", n)
	}
	if err := call.stream.CloseSend(); err != nil { // Envoy: EOF when the whole response is over
		t.Fatal(err)
	}
	call.ended()
	eventually(t, "released", func() bool { return inFlight(k.snapshot) == 0 })
	if r := <-k.records; r.Status != 200 || r.Outcome != "aggregated" || len(r.Profiles) != 1 || r.Seconds.FirstByte <= 0 {
		t.Errorf("record %+v", r)
	}
}

func TestStreamResetAfterTheAnswerBecomesAnEstimate(t *testing.T) { // third row: never taken for a client's abort
	for name, headers := range map[string]bool{"before the response": false, "after response headers": true} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, kitOptions{snapshot: pooltest.Snapshot(pooltest.E("a"))})
			call := k.open()
			call.duplex(first{modes: modesOf(modeDuplex, modeNone)}, []byte(chat))
			if headers {
				call.send(responseHeadersMessage("200", ""))
				call.recv()
			}
			call.cancel()
			<-k.records
			load := &k.snapshot.Endpoints[0].Load
			if n := load.Requests(); n != 1 {
				t.Fatalf("%d in flight, want the estimate", n)
			}
			load.ScrapeBegins(time.Now(), true)
			if n := load.Requests(); n != 1 {
				t.Fatalf("released by the first scrape")
			}
			load.ScrapeBegins(time.Now(), true)
			if n := load.Requests(); n != 0 {
				t.Errorf("%d in flight after the second scrape", n)
			}
		})
	}
}

func TestClientGoneBeforeTheAnswerReleasesAtOnce(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.send(first{}.message(t))
	call.send(bodyMessage([]byte(`{"model":`), false))
	eventually(t, "the body is held", func() bool { return k.gate.Held() > 0 })
	call.cancel()
	eventually(t, "stream closed", func() bool { return k.server.Streams() == 0 })
	if inFlight(k.snapshot) != 0 || k.gate.Held() != 0 {
		t.Errorf("%d in flight, %d bytes held", inFlight(k.snapshot), k.gate.Held())
	}
}

func TestFullDuplexResponseIsEchoed(t *testing.T) { // P2
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.duplex(first{modes: modesOf(modeDuplex, modeDuplex)}, []byte(chat))
	// Envoy sends body messages before it has the header answer.
	call.send(responseHeadersMessage("200", "192.168.1.2:8000"))
	events := []string{"data: {\"choices\":[]}\n\n", "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tok", "ens\":17}}\n\n", "data: [DONE]\n\n", ""}
	for i, e := range events {
		call.send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{
			ResponseBody: &extprocv3.HttpBody{Body: []byte(e), EndOfStream: i == len(events)-1},
		}})
	}
	if call.recv().GetResponseHeaders() == nil {
		t.Fatal("want the header answer")
	}
	for i, e := range events {
		s := call.recv().GetResponseBody().GetResponse().GetBodyMutation().GetStreamedResponse()
		if string(s.GetBody()) != e || s.GetEndOfStream() != (i == len(events)-1) {
			t.Errorf("event %d: got %q, end %v", i, s.GetBody(), s.GetEndOfStream())
		}
	}
	eventually(t, "released at end_of_stream", func() bool { return inFlight(k.snapshot) == 0 })
}

func TestStreamedAndBufferedResponsesPass(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	for _, mode := range []string{"STREAMED", "BUFFERED"} {
		m := modeStreamed
		if mode == "BUFFERED" {
			m = modeBuffered
		}
		call := k.open()
		call.duplex(first{modes: modesOf(modeDuplex, m)}, []byte(chat))
		call.send(responseHeadersMessage("200", ""))
		call.recv()
		call.send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{ResponseBody: &extprocv3.HttpBody{Body: []byte("x"), EndOfStream: true}}})
		b := call.recv().GetResponseBody()
		if b == nil || b.GetResponse().GetBodyMutation() != nil {
			t.Errorf("%s: want an answer without a mutation, got %v", mode, b)
		}
	}
}

func TestResponseTrailersAreAnswered(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.duplex(first{modes: modesOf(modeDuplex, modeNone)}, []byte(chat))
	call.send(responseHeadersMessage("200", ""))
	call.recv()
	call.send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseTrailers{ResponseTrailers: &extprocv3.HttpTrailers{}}})
	if call.recv().GetResponseTrailers() == nil {
		t.Error("want the trailers answer")
	}
}

func TestResponseOnlyStream(t *testing.T) { // hermetic rows 15 to 18: no request phase
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.send(responseHeadersMessage("200", ""))
	if call.recv().GetResponseHeaders() == nil {
		t.Error("want the header answer")
	}
}

func TestServedEndpointIsCredited(t *testing.T) { // P13: failures count for whoever served
	k := newKit(t, kitOptions{snapshot: three()})
	for i := range pool.EjectAfter {
		call := k.open()
		call.duplex(first{modes: modesOf(modeDuplex, modeNone), headers: []string{"x-request-id", strconv.Itoa(i)}}, []byte(chat))
		call.send(responseHeadersMessage("503", "192.168.1.3:8000"))
		call.recv()
		call.cancel()
		<-k.records
	}
	if s := k.snapshot.Endpoints[2].Health.Standing(time.Now()); s != pool.Ejected {
		t.Errorf("the endpoint that served is %v, want ejected", s)
	}
	if s := k.snapshot.Endpoints[1].Health.Standing(time.Now()); s != pool.Healthy {
		t.Errorf("the endpoint that was picked is %v", s)
	}
}

func TestDrainEndsQuietStreams(t *testing.T) { // docs/design.md 5.3
	k := newKit(t, kitOptions{snapshot: three()})
	waiting, answered := k.open(), k.open()
	waiting.duplex(first{modes: modesOf(modeDuplex, modeNone)}, []byte(chat))
	answered.duplex(first{modes: modesOf(modeDuplex, modeNone)}, []byte(chat))
	answered.send(responseHeadersMessage("200", ""))
	answered.recv()
	k.server.Drain()
	answered.ended()
	if n := k.server.Streams(); n != 1 {
		t.Fatalf("%d streams, want the one that waits for its response", n)
	}
	k.server.Cut()
	waiting.ended()
}

func TestObservabilityModeIsOnlyRead(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	m := first{}.message(t)
	m.ObservabilityMode = true
	call.send(m)
	call.send(bodyMessage([]byte(chat), true))
	if err := call.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	call.ended()
	if inFlight(k.snapshot) != 0 {
		t.Error("load was reserved")
	}
}
