// SPDX-License-Identifier: Apache-2.0

package app

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/simulate"
)

// rendezvousing is a stack of SGLang engines, whose legs run at once.
func rendezvousing(t *testing.T, name, config string) *stack {
	t.Helper()
	o := fast(2, 2)
	o.Template.Engine = "sglang"
	return newStack(t, stackOptions{pool: o, envoy: name, config: "disaggregation: {kvConnector: sglang" + config + "}\n"})
}

// TestEnvoyRendezvous: both legs at once, and an answer as from one engine.
func TestEnvoyRendezvous(t *testing.T) {
	t.Parallel()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.FullDuplexOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := rendezvousing(t, name, "")
			for i, stream := range []string{"", `,"stream":true`} {
				id := []string{"plain", "stream"}[i]
				s.post("/v1/chat/completions", chatBody(100, stream), "x-request-id", id).whole(t, "disaggregated")
				d := s.decision(id)
				if len(d.Attempts) != 1 || d.Attempts[0].Reason != "ok" || d.Picks["prefill"] == "" || d.Checkpoint != "TRANSFER_COMPLETE" {
					t.Errorf("%+v", d)
				}
			}
			s.settled()
		})
	}
}

// TestEnvoyRendezvousPrefillFails: the client is answered as soon as it is known that decode waits in vain, which SGLang
// would do for 300 s, and decode is ended.
func TestEnvoyRendezvousPrefillFails(t *testing.T) {
	t.Parallel()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.FullDuplexOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := rendezvousing(t, name, ", prefill: {timeout: 2s}")
			s.setFaults("prefill", simulate.Fault{Kind: "hang", Phase: "prefill"})
			start := time.Now()
			r := s.post("/v1/chat/completions", chatBody(100, ""), "x-request-id", "plain")
			var body struct{ Error struct{ Type string } }
			if err := json.Unmarshal([]byte(r.body), &body); err != nil || r.status != http.StatusBadGateway || body.Error.Type != "BadGatewayError" {
				t.Errorf("%d: %s", r.status, r.body)
			}
			if reason := r.header.Get("x-llm-d-request-dropped-reason"); reason != "prefill-failed" || time.Since(start) > 20*time.Second {
				t.Errorf("reason %q after %v", reason, time.Since(start))
			}
			// The head of a stream comes before its first token. Where it need not be passed on at once, it waits for the
			// prefill; elsewhere the stream can only be cut, which the client must be able to tell.
			r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", strings.NewReader(chatBody(100, `,"stream":true`)), "x-request-id", "stream")
			if held := name == envoy.FullDuplexOverrideHost; held && (err != nil || r.status != http.StatusBadGateway) || !held && err == nil {
				t.Errorf("not cut: %d: %s, %v", r.status, r.body, err)
			}
			for _, id := range []string{"plain", "stream"} {
				if d := s.decision(id); len(d.Attempts) != 1 || d.Attempts[0].Reason != "timeout" || d.Error == "" {
					t.Errorf("%s: %+v", id, d)
				}
			}
			eventually(t, "decode was told", func() bool { return s.sum("baton_sidecar_aborts_total", "ok") == 2 })
			for _, e := range s.engines("decode") {
				eventually(t, "decode is idle", func() bool { return e.Stats().Running == 0 && e.Stats().Waiting == 0 })
			}
			s.setFaults("prefill")
			s.post("/v1/chat/completions", chatBody(100, "")).whole(t, "disaggregated")
			s.settled()
		})
	}
}
