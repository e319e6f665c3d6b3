// SPDX-License-Identifier: Apache-2.0

package app

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/baton-epp/baton/manifests/envoy"
)

// TestEnvoyRoutes: what Baton picks is who serves, by each way of routing, and headers say so.
func TestEnvoyRoutes(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, pool: fast(2, 3)})
			served := map[string]int{}
			for i := range 12 {
				id := fmt.Sprintf("r%d", i)
				body := fmt.Sprintf(`{"model":"tiny","max_tokens":2,"messages":[{"role":"user","content":"%d %s"}]}`, i, strings.Repeat("word ", 40))
				s.post("/v1/chat/completions", body, "x-request-id", id).whole(t, "disaggregated")
				d := s.decision(id)
				served[d.Picks["decode"]]++
				if d.Served != "" && d.Picks["decode"] != "default/"+s.named(d.Served) {
					t.Errorf("picked %s, served by %s", d.Picks["decode"], d.Served)
				}
			}
			for _, e := range s.engines("decode") {
				for _, b := range e.Bodies() {
					if d := b.Header.Get("X-Gateway-Destination-Endpoint"); d != e.Addr().String() {
						t.Errorf("%s got a request for %s", e.Name(), d)
					}
				}
				if n := len(e.Bodies()); n != served["default/"+e.Name()] {
					t.Errorf("%s served %d, picked %d times", e.Name(), n, served["default/"+e.Name()])
				}
			}
			s.settled()
		})
	}
}

// named is the engine at an address.
func (s *stack) named(hostport string) string {
	for _, e := range s.pool.Engines() {
		if e.Addr().String() == hostport {
			return e.Name()
		}
	}
	return ""
}

// TestEnvoyIPv6: endpoints on ::1, by both ways of routing.
func TestEnvoyIPv6(t *testing.T) {
	t.Parallel()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "[::1]:0")
	if err != nil {
		t.Skipf("NO IPv6 on this machine: %v", err)
	}
	_ = l.Close()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.QuietOriginalDst, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			o := fast(2, 2)
			o.Host = "::1"
			s := newStack(t, stackOptions{envoy: name, pool: o})
			for _, stream := range []string{"", `,"stream":true`} {
				s.post("/v1/chat/completions", chatBody(100, stream)).whole(t, "disaggregated")
			}
			for _, b := range s.bodies("decode") {
				if d := b.Header.Get("X-Gateway-Destination-Endpoint"); !strings.HasPrefix(d, "[::1]:") {
					t.Errorf("destination %q", d)
				}
				if p := b.Header.Get("X-Prefiller-Host-Port"); !strings.HasPrefix(p, "[::1]:") {
					t.Errorf("prefiller %q", p)
				}
			}
			s.settled()
		})
	}
}

// TestEnvoyTLS: Baton with the certificate it makes itself, Envoy with the configuration for it.
func TestEnvoyTLS(t *testing.T) {
	t.Parallel()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{
				envoy:   name,
				options: func(o *Options) { o.SecureServing = true },
				values:  func(v *envoy.Values) { v.EPPTLS = true },
			})
			for _, stream := range []string{"", `,"stream":true`} {
				s.post("/v1/chat/completions", chatBody(100, stream)).whole(t, "disaggregated")
			}
			s.settled()
		})
	}
}

// TestEnvoyUnixSocket: Envoy and a plain gRPC client reach Baton through a socket, with TCP switched off.
func TestEnvoyUnixSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "epp.sock")
	s := newStack(t, stackOptions{
		options: func(o *Options) { o.GRPCPort, o.GRPCSocket = -1, path },
		values:  func(v *envoy.Values) { v.EPPPort = 1 },
		rewrite: replacing("address: { socket_address: { address: 127.0.0.1, port_value: 1 } }", fmt.Sprintf("address: { pipe: { path: %q } }", path)),
	})
	s.post("/v1/chat/completions", chatBody(100, "")).whole(t, "disaggregated")
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{Service: healthExtProc})
	if err != nil || r.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("health through the socket: %v, %v", r, err)
	}
	s.settled()
}

// TestEnvoyEveryAPI: each generation API is disaggregated where its wire allows it, and answers in its own form.
func TestEnvoyEveryAPI(t *testing.T) {
	t.Parallel()
	o := fast(1, 1)
	o.Template.ScaleOut = true
	s := newStack(t, stackOptions{pool: o})
	prompt := strings.Repeat("word ", 100)
	for path, c := range map[string]struct{ body, outcome, want string }{
		"/v1/chat/completions":         {chatBody(100, ""), "disaggregated", `"chat.completion"`},
		"/v1/completions":              {fmt.Sprintf(`{"model":"tiny","max_tokens":4,"prompt":%q}`, prompt), "disaggregated", `"text_completion"`},
		"/v1/completions?many":         {fmt.Sprintf(`{"model":"tiny","max_tokens":4,"prompt":[%q,%q]}`, prompt, prompt), "aggregated", `"text_completion"`},
		"/v1/completions?echo":         {fmt.Sprintf(`{"model":"tiny","max_tokens":4,"echo":true,"prompt":%q}`, prompt), "aggregated", `"text_completion"`},
		"/v1/messages":                 {chatBody(100, ""), "disaggregated", `"message"`},
		"/inference/v1/generate":       {`{"model":"tiny","token_ids":[` + strings.Repeat("5,", 200) + `6],"sampling_params":{"max_tokens":4}}`, "disaggregated", `"token_ids"`},
		"/v1/chat/completions?limit=1": {strings.Replace(chatBody(100, ""), `"max_tokens":4`, `"max_tokens":1`, 1), "disaggregated", `"chat.completion"`},
	} {
		r := s.post(path, c.body)
		r.whole(t, c.outcome)
		if !strings.Contains(r.body, c.want) {
			t.Errorf("%s: %s", path, r.body)
		}
	}
	s.settled()
}

// TestEnvoySubRequests: what leaves for a prefiller carries the allowlist of headers and nothing else of the client's.
func TestEnvoySubRequests(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{pool: fast(1, 1)})
	s.post("/v1/chat/completions", chatBody(100, `,"stream":true,"stream_options":{"include_usage":true}`), "x-request-id", "mine", "authorization", "Bearer b",
		"cookie", "secret", "x-tenant", "secret", "traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").whole(t, "disaggregated")
	for _, b := range append(s.bodies("prefill"), s.bodies("decode")...) {
		var body map[string]json.RawMessage
		if err := json.Unmarshal(b.Body, &body); err != nil {
			t.Fatal(err)
		}
		trace := strings.Split(b.Header.Get("Traceparent"), "-")
		if b.RequestID != "mine" || b.Header.Get("Authorization") != "Bearer b" || len(trace) != 4 || trace[1] != "0af7651916cd43dd8448eb211c80319c" {
			t.Errorf("%s: headers %v", b.Phase, b.Header)
		}
		if b.Phase == "transfer" {
			if b.Attempt != "" || b.Header.Get("Cookie") != "secret" || b.Header.Get("X-Baton-Depth") != "" {
				t.Errorf("decode: headers %v", b.Header)
			}
			continue
		}
		if b.Attempt != "1" || b.Header.Get("X-Baton-Depth") != "1" || strings.Contains(fmt.Sprint(b.Header), "secret") {
			t.Errorf("prefill: headers %v", b.Header)
		}
		if string(body["stream"]) == "true" || string(body["max_tokens"]) != "1" || body["stream_options"] != nil {
			t.Errorf("prefill: body %v of %s", slices.Sorted(maps.Keys(body)), b.Body)
		}
	}
	if r, err := s.try(t.Context(), http.MethodGet, "/v1/models", http.NoBody, "x-request-id", "mine"); err != nil || r.status != http.StatusOK {
		t.Errorf("%v, %d", err, r.status)
	}
	s.settled()
}
