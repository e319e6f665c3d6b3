// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/internal/envoytest"
	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/simulate"
)

// stack is the whole thing on loopback: simulated engines, the picker in this process, and a real Envoy before it.
type stack struct {
	t      *testing.T
	pool   *simulate.Pool
	app    *App
	envoy  *envoytest.Envoy
	client *http.Client
	stop   context.CancelFunc // SIGTERM for the picker
	done   chan error
	config string // path of the configuration file
}

// stackOptions vary a stack; the zero value is two prefill and two decode engines behind quiet-override-host.
type stackOptions struct {
	pool    simulate.PoolOptions
	envoy   string // name of a shipped configuration
	values  func(*envoy.Values)
	rewrite func(string) string // of the rendered Envoy configuration, for gateways unlike ours
	config  string              // what follows the plugins that every test has
	decider string              // of prefill; default always-disagg-pd-decider
	options func(*Options)
	noEnvoy bool
}

// fast is a pool whose requests take milliseconds.
func fast(prefill, decode int) simulate.PoolOptions {
	return simulate.PoolOptions{
		Prefill: prefill, Decode: decode,
		Template: simulate.Options{PrefillFixed: time.Millisecond, InterToken: time.Millisecond, Handshake: time.Millisecond, Seed: 1},
	}
}

const testConfig = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, parameters: {path: endpoints.yaml, watchFile: true}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: %s}}}
- {type: always-disagg-pd-decider}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 64}}
- {type: approx-prefix-cache-producer}
- {type: prefill-filter}
- {type: decode-filter}
- {type: prefix-cache-scorer}
- {type: queue-scorer}
- {type: active-request-scorer}
- {type: max-score-picker}
dataLayer: {discovery: {pluginRef: file-discovery}}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
%s
`

func newStack(t *testing.T, o stackOptions) *stack {
	t.Helper()
	if !o.noEnvoy {
		envoytest.Binary(t) // skips before anything is started
	}
	if o.pool.Prefill+o.pool.Decode+o.pool.Both+o.pool.Plain == 0 {
		o.pool = fast(2, 2)
	}
	if o.decider == "" {
		o.decider = "always-disagg-pd-decider"
	}
	dir := t.TempDir()
	s := &stack{t: t, config: filepath.Join(dir, "epp.yaml"), done: make(chan error, 1)}
	s.startPool(o.pool, filepath.Join(dir, "endpoints.yaml"))
	s.writeConfig(fmt.Sprintf(testConfig, o.decider, o.config))
	s.startApp(o.options)
	if !o.noEnvoy {
		s.startEnvoy(o)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 2000, DisableCompression: true}
	s.client = &http.Client{Transport: transport, Timeout: time.Minute}
	t.Cleanup(transport.CloseIdleConnections)
	return s
}

func (s *stack) startPool(o simulate.PoolOptions, endpoints string) {
	s.t.Helper()
	var err error
	if s.pool, err = simulate.NewPool(o); err != nil {
		s.t.Fatal(err)
	}
	if err := s.pool.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = s.pool.Close() })
	if err := s.pool.WriteEndpoints(endpoints); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) writeConfig(text string) {
	s.t.Helper()
	if err := os.WriteFile(s.config+".next", []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(s.config+".next", s.config); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) startApp(change func(*Options)) {
	s.t.Helper()
	o := DefaultOptions()
	o.ConfigFile, o.BindAddress, o.GRPCPort, o.HealthPort, o.MetricsPort = s.config, "127.0.0.1", 0, 0, 0
	o.SecureServing, o.EnableDebug = false, true
	o.DrainDelay, o.DrainTimeout = 0, 5*time.Second
	o.Logger = slog.New(slog.NewTextHandler(testWriter{s.t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if change != nil {
		change(&o)
	}
	var err error
	if s.app, err = New(o); err != nil {
		s.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background()) //nolint:usetesting // outlives the test's context: the drain is under test
	s.stop = stop
	go func() { s.done <- s.app.Run(ctx) }()
	s.t.Cleanup(func() {
		stop()
		if err := <-s.done; err != nil {
			s.t.Errorf("baton ended with: %v", err)
		}
	})
	eventually(s.t, "the pool is known", func() bool { return s.app.Snapshot().Synced && len(s.app.Snapshot().Endpoints) > 0 })
}

// testWriter sends log lines to the test.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil { // a test that has ended takes no lines
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func (s *stack) startEnvoy(o stackOptions) {
	s.t.Helper()
	if o.envoy == "" {
		o.envoy = envoy.QuietOverrideHost
	}
	s.envoy = envoytest.Start(s.t, func(listen, admin int) ([]byte, error) {
		v := envoy.Values{ListenPort: listen, AdminPort: admin, EPPPort: port(s.app.Addr())}
		for _, e := range s.pool.Engines() {
			v.Endpoints = append(v.Endpoints, e.Addr())
		}
		if o.values != nil {
			o.values(&v)
		}
		text, err := envoy.Render(o.envoy, v)
		if err == nil && o.rewrite != nil {
			changed := o.rewrite(string(text))
			if changed == string(text) {
				return nil, fmt.Errorf("rewrite changed nothing in %s", o.envoy)
			}
			text = []byte(changed)
		}
		return text, err
	})
}

func port(a net.Addr) int { return int(netip.MustParseAddrPort(a.String()).Port()) }

// reply is a whole answer.
type reply struct {
	status  int
	header  http.Header
	body    string
	elapsed time.Duration
}

// post sends a body through Envoy and reads the whole answer.
func (s *stack) post(path, body string, headers ...string) reply {
	s.t.Helper()
	r, err := s.try(s.t.Context(), http.MethodPost, path, strings.NewReader(body), headers...)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// try is post for callers that expect trouble.
func (s *stack) try(ctx context.Context, method, path string, body io.Reader, headers ...string) (reply, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.envoy.URL+path, body)
	if err != nil {
		return reply{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	start := time.Now()
	resp, err := s.client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(text), time.Since(start)}, err
}

// chatBody is a chat request with about words words of distinct prompt.
func chatBody(words int, extra string) string {
	return fmt.Sprintf(`{"model":"tiny","max_tokens":4%s,"messages":[{"role":"user","content":"%s"}]}`, extra, strings.Repeat("word ", words))
}

// decision fetches the record of a request from /debug/decisions.
func (s *stack) decision(requestID string) director.Record {
	s.t.Helper()
	var found []director.Record
	eventually(s.t, "a decision record of "+requestID, func() bool {
		resp, err := http.Get("http://" + s.app.MetricsAddr().String() + "/debug/decisions?request_id=" + requestID)
		if err != nil {
			s.t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&found); err != nil {
			s.t.Fatal(err)
		}
		return len(found) > 0
	})
	return found[0]
}

// settled asserts that nothing is left: no load counted, no block held that is not accounted as leaked.
func (s *stack) settled() {
	s.t.Helper()
	eventually(s.t, "no load left", func() bool {
		for _, e := range s.app.Snapshot().Endpoints {
			if e.Load.Requests() != 0 || e.Load.Tokens() != 0 {
				return false
			}
		}
		return true
	})
	eventually(s.t, "no KV block held", func() bool {
		for _, e := range s.pool.Engines() {
			if len(e.Held()) > 0 {
				return false
			}
		}
		return true
	})
}

// metric reads one series of the picker's metrics; 0 when it is not there.
func (s *stack) metric(series string) float64 {
	s.t.Helper()
	resp, err := http.Get("http://" + s.app.MetricsAddr().String() + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, series+" "); ok {
			var v float64
			if _, err := fmt.Sscan(rest, &v); err != nil {
				s.t.Fatal(err)
			}
			return v
		}
	}
	return 0
}

// eventually polls until the condition holds or twenty seconds are over.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// prefills and decodes count the requests that the engines of a role saw.
func (s *stack) seen(role string) (n int) {
	for _, e := range s.pool.Engines() {
		if e.Role() == role {
			n += len(e.Bodies())
		}
	}
	return n
}
