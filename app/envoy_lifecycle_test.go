// SPDX-License-Identifier: Apache-2.0

package app

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
)

// TestEnvoySIGTERMWithAnotherReplica: one of two replicas gets SIGTERM during traffic. Envoy's health check and its
// retries move everything to the other one, and not one request is lost.
func TestEnvoySIGTERMWithAnotherReplica(t *testing.T) {
	t.Parallel()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStack(t, stackOptions{
				envoy: name, pickers: 2, values: timeout(time.Minute),
				options: func(o *Options) { o.DrainDelay, o.DrainTimeout = 3*time.Second, time.Minute },
			})
			var answered, lost atomic.Int64
			stop := make(chan struct{})
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					stream := []string{"", `,"stream":true`}[i%2]
					for {
						select {
						case <-stop:
							return
						default:
						}
						r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", strings.NewReader(chatBody(60, stream)))
						if err != nil || r.status != http.StatusOK || stream != "" && !strings.HasSuffix(strings.TrimSpace(r.body), "data: [DONE]") {
							t.Errorf("lost: %v, %d: %.300s", err, r.status, r.body)
							lost.Add(1)
						}
						answered.Add(1)
					}
				})
			}
			first := s.pickers[0].app.server
			eventually(t, "both replicas have traffic", func() bool {
				return s.pickers[0].sum("baton_extproc_streams_total") > 5 && s.pickers[1].sum("baton_extproc_streams_total") > 5
			})
			s.stop()
			<-s.ended
			if n := first.Streams(); n != 0 {
				t.Errorf("%d streams open at the end", n)
			}
			after := answered.Load()
			eventually(t, "the other replica goes on", func() bool { return answered.Load() > after+20 || lost.Load() > 0 })
			close(stop)
			wg.Wait()
			t.Logf("%d answered, %d lost", answered.Load(), lost.Load())
			s.settled()
		})
	}
}

// TestEnvoySIGTERMFinishesWhatRuns: a single replica that gets SIGTERM finishes held requests, and running streams
// come to their end, even those that outlast it.
func TestEnvoySIGTERMFinishesWhatRuns(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := single(2, 1)
			o.Template.MaxNumSeqs = 0
			s := newStack(t, stackOptions{envoy: name, pool: o, options: func(o *Options) { o.DrainTimeout = time.Minute }})
			// A stream that runs; the prefills of all further requests take their time.
			body := s.open(t.Context(), 2000)
			event(t, body.Reader)
			s.delayPrefills(time.Second)
			held := s.chat(t.Context(), chatBody(100, ""), "x-request-id", "held")
			heldStream := s.chat(t.Context(), chatBody(100, `,"stream":true`))
			eventually(t, "two are held", func() bool { return s.seen("prefill") == 3 })
			s.stop()
			for _, answer := range []<-chan result{held, heldStream} {
				r := <-answer
				if r.err != nil {
					t.Fatal(r.err)
				}
				r.whole(t, "disaggregated")
			}
			rest, err := io.ReadAll(body)
			if err != nil || !strings.HasSuffix(strings.TrimSpace(string(rest)), "data: [DONE]") || strings.Count(string(rest), "data: ") < 1900 {
				t.Errorf("the running stream: %v, %d events", err, strings.Count(string(rest), "data: "))
			}
			<-s.ended
			s.settled()
		})
	}
}

// TestEnvoyKillSwitch: disaggregation goes off and on with the configuration file, without a restart; a bad file changes
// nothing and is shown.
func TestEnvoyKillSwitch(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{})
	const bad = "baton_app_config_bad"
	outcome := func() string {
		r := s.post("/v1/chat/completions", chatBody(100, ""))
		r.whole(t, r.header.Get("x-baton-outcome"))
		return r.header.Get("x-baton-outcome")
	}
	if got := outcome(); got != "disaggregated" {
		t.Fatalf("outcome %q", got)
	}
	s.writeConfig("disaggregation: {mode: \"off\"}\n")
	start := time.Now()
	eventually(t, "prefills stop", func() bool { return outcome() == "aggregated" })
	if took := time.Since(start); took > 10*time.Second { // 3 s on a machine that is not starved
		t.Errorf("the kill switch took %v", took)
	}
	n := s.seen("prefill")
	s.writeConfig("disaggregation: {mode: onn}\nnonsense: 1\n")
	eventually(t, "the bad file is noticed", func() bool { return s.metric(bad) == 1 })
	if got := outcome(); got != "aggregated" || s.seen("prefill") != n {
		t.Errorf("with a bad file: outcome %q, %d more prefills", got, s.seen("prefill")-n)
	}
	s.writeConfig("disaggregation: {mode: auto}\n")
	eventually(t, "prefills are back", func() bool { return outcome() == "disaggregated" })
	if s.metric(bad) != 0 {
		t.Error("the good file is still called bad")
	}
	s.settled()
}

// TestEnvoyPickerGone: without a picker nobody is chosen; the client gets an error, never an empty or misrouted request.
func TestEnvoyPickerGone(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{})
	s.post("/v1/chat/completions", chatBody(100, "")).whole(t, "disaggregated")
	s.stop()
	<-s.ended
	n := s.seen("decode")
	r := s.post("/v1/chat/completions", chatBody(100, ""), "x-gateway-destination-endpoint", s.engines("decode")[0].Addr().String())
	if r.status < 500 || s.seen("decode") != n {
		t.Errorf("status %d, %d more decode requests", r.status, s.seen("decode")-n)
	}
	s.settled()
}
