// SPDX-License-Identifier: Apache-2.0

package app

import (
	"net/http"
	"strings"
	"testing"

	"github.com/baton-epp/baton/manifests/envoy"
)

// TestEnvoyDisaggregated is the main path on every shipped configuration: one prefill, the KV pulled, the answer whole.
func TestEnvoyDisaggregated(t *testing.T) {
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name})
			for _, stream := range []string{"", `,"stream":true`} {
				before := s.seen("prefill")
				r := s.post("/v1/chat/completions", chatBody(100, stream), "x-request-id", "main"+stream[:min(2, len(stream))])
				if r.status != 200 || r.header.Get("x-baton-outcome") != "disaggregated" {
					t.Fatalf("status %d, outcome %q: %s", r.status, r.header.Get("x-baton-outcome"), r.body)
				}
				if stream != "" && !strings.HasSuffix(strings.TrimSpace(r.body), "data: [DONE]") {
					t.Errorf("stream is cut: %s", r.body)
				}
				if n := s.seen("prefill") - before; n != 1 {
					t.Errorf("%d prefills, want 1", n)
				}
			}
			pulls := 0
			for _, e := range s.pool.Engines() {
				for _, p := range e.Pulls() {
					pulls++
					if p.Tokens == 0 {
						t.Errorf("an empty pull: %+v", p)
					}
				}
			}
			if pulls != 2 {
				t.Errorf("%d pulls of KV, want 2", pulls)
			}
			d := s.decision("main")
			if d.Outcome != "disaggregated" || d.Status != 200 || d.Picks["prefill"] == "" || len(d.Attempts) != 1 || d.Checkpoint != "TRANSFER_COMPLETE" {
				t.Errorf("decision %+v", d)
			}
			s.settled()
		})
	}
}

func TestEnvoyPlainRequests(t *testing.T) {
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, decider: "prefix-based-pd-decider"})
			r, err := s.try(t.Context(), http.MethodGet, "/v1/models", http.NoBody)
			if err != nil || r.status != 200 || !strings.Contains(r.body, `"tiny"`) {
				t.Fatalf("GET: %v, %d: %s", err, r.status, r.body)
			}
			if r := s.post("/v1/chat/completions", chatBody(3, "")); r.status != 200 || r.header.Get("x-baton-outcome") != "aggregated" {
				t.Errorf("short prompt: %d, %q: %s", r.status, r.header.Get("x-baton-outcome"), r.body)
			}
			if n := s.seen("prefill"); n != 0 {
				t.Errorf("%d requests reached prefill endpoints", n)
			}
			s.settled()
		})
	}
}
