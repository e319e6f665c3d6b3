// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
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
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/internal/envoytest"
	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/simulate"
)

// stack is the whole thing on loopback: simulated engines, the picker in this process, and a real Envoy before it.
type stack struct {
	*picker // the first
	t       *testing.T
	pool    *simulate.Pool
	pickers []*picker
	envoy   *envoytest.Envoy
	client  *http.Client
	options stackOptions
	dir     string
	config  string // path of the configuration file
}

// picker is a running App.
type picker struct {
	app   *App
	stop  context.CancelFunc // SIGTERM
	ended chan struct{}      // closed when Run has returned
	err   error              // of Run; read it after ended
}

func (p *picker) stopped() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// stackOptions vary a stack; the zero value is two prefill and two decode engines behind quiet-override-host.
type stackOptions struct {
	pool    simulate.PoolOptions
	envoy   string // name of a shipped configuration
	values  func(*envoy.Values)
	rewrite func(string) string // of the rendered Envoy configuration, for gateways unlike ours
	config  string              // what follows the plugins that every test has
	spy     func()              // called whenever decode endpoints are scored
	whole   string              // the whole configuration, instead
	decider string              // of prefill; default always-disagg-pd-decider
	options func(*Options)
	noEnvoy bool
	pickers int // replicas; default 1
}

// spy is a scorer that likes all the same and calls a test.
type spy func()

func (f spy) Score(_ *scheduler.Cycle, _ []scheduler.Candidate, out []float64) {
	clear(out)
	f()
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
	s := &stack{t: t, options: o, dir: dir, config: filepath.Join(dir, "epp.yaml")}
	s.startPool(o.pool)
	s.writeConfig(o.config)
	for range max(1, o.pickers) {
		s.pickers = append(s.pickers, s.startPicker(o.options))
	}
	s.picker = s.pickers[0]
	if !o.noEnvoy {
		s.startEnvoy(o)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 2000, DisableCompression: true}
	s.client = &http.Client{
		Transport: transport, Timeout: 2 * time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(transport.CloseIdleConnections)
	return s
}

func (s *stack) startPool(o simulate.PoolOptions) {
	s.t.Helper()
	var err error
	if s.pool, err = simulate.NewPool(o); err != nil {
		s.t.Fatal(err)
	}
	if err := s.pool.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = s.pool.Close() })
	if err := s.pool.WriteEndpoints(s.endpointsFile()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) endpointsFile() string { return filepath.Join(s.dir, "endpoints.yaml") }

// writeConfig puts a configuration file in place that ends in extra.
func (s *stack) writeConfig(extra string) {
	s.t.Helper()
	text := fmt.Sprintf(testConfig, s.options.decider, extra)
	if s.options.spy != nil {
		text = strings.Replace(text, "- {type: queue-scorer}", "- {type: queue-scorer}\n- {type: spy}", 1)
		text = strings.Replace(text, "{pluginRef: decode-filter}", "{pluginRef: decode-filter}, {pluginRef: spy}", 1)
	}
	if s.options.whole != "" {
		text = s.options.whole + extra
	}
	if !strings.Contains(text, "scraping:") {
		text += "scraping: {idleInterval: 200ms}\n" // reservations that become estimates end with the second scrape
	}
	replaceFile(s.t, s.config, patientConnects(text))
}

// patientConnects lets connections take their time, as they do on a loaded machine. What follows when one takes longer
// than its limit is a matter of package sidecar's tests, and has a reason of its own, which would stand for any other.
func patientConnects(text string) string {
	const limit = "connectTimeout: 10s"
	switch {
	case strings.Contains(text, "connectTimeout"):
		return text
	case strings.Contains(text, "prefill: {"):
		return strings.Replace(text, "prefill: {", "prefill: {"+limit+", ", 1)
	case strings.Contains(text, "disaggregation: {"):
		return strings.Replace(text, "disaggregation: {", "disaggregation: {prefill: {"+limit+"}, ", 1)
	}
	return text + "disaggregation: {prefill: {" + limit + "}}\n"
}

// replaceFile puts a file in place at once, whole.
func replaceFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".next", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".next", path); err != nil {
		t.Fatal(err)
	}
}

func (s *stack) startPicker(change func(*Options)) *picker {
	s.t.Helper()
	o := DefaultOptions()
	o.ConfigFile, o.BindAddress, o.GRPCPort, o.HealthPort, o.MetricsPort = s.config, "127.0.0.1", 0, 0, 0
	o.SecureServing, o.EnableDebug = false, true
	o.DrainDelay, o.DrainTimeout = 0, 5*time.Second
	o.Logger = slog.New(slog.NewTextHandler(testWriter{s.t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if call := s.options.spy; call != nil {
		o.Plugins = scheduler.Registry{"spy": func(*scheduler.Builder, config.Parameters) (any, error) { return spy(call), nil }}
	}
	if change != nil {
		change(&o)
	}
	a, err := New(o)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background()) // outlives the test's context: the drain is under test
	p := &picker{app: a, stop: stop, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		p.err = a.Run(ctx)
	}()
	s.t.Cleanup(func() {
		stop()
		<-p.ended
		if p.err != nil {
			s.t.Errorf("baton ended with: %v", p.err)
		}
	})
	eventually(s.t, "the pool is known", func() bool { return a.Snapshot().Synced && len(a.Snapshot().Endpoints) > 0 })
	return p
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
	s.envoy = envoytest.Start(s.t, func() ([]byte, error) {
		v := envoy.Values{MessageTimeout: time.Minute} // the shipped 5 s are a limit of working machines
		if s.app.Addr().Network() == "tcp" {
			v.EPPPort = port(s.app.Addr())
		}
		for _, e := range s.pool.Engines() {
			v.Endpoints = append(v.Endpoints, e.Addr())
		}
		if o.values != nil {
			o.values(&v)
		}
		text, err := envoy.Render(o.envoy, v)
		text = patientEnvoy(s.addPickers(text))
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

// patientEnvoy lets connections and health checks take longer than shipped configurations do: a machine that is busy with
// other tests would make the picker unhealthy. What refuses or resets is noticed as soon.
func patientEnvoy(text []byte) []byte {
	text = bytes.ReplaceAll(text, []byte(" connect_timeout: 1s\n"), []byte(" connect_timeout: 10s\n"))
	return bytes.ReplaceAll(text, []byte("      timeout: 1s\n"), []byte("      timeout: 30s\n"))
}

// addPickers lists the further replicas behind the first.
func (s *stack) addPickers(text []byte) []byte {
	for _, p := range s.pickers[1:] {
		one := fmt.Sprintf("        - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: %d } } }\n", port(s.app.Addr()))
		more := strings.Replace(one, strconv.Itoa(port(s.app.Addr())), strconv.Itoa(port(p.app.Addr())), 1)
		text = bytes.Replace(text, []byte(one), []byte(one+more), 1)
	}
	return text
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

// settled asserts that nothing is left: no stream, no byte and no load counted, no block held, no engine dead, and no
// prefill leaked.
func (s *stack) settled() {
	s.t.Helper()
	s.settledWith(0)
}

// settledWith is settled for a test that makes prefills leak: as many as the picker counts, and it counts leaks.
func (s *stack) settledWith(leaks int) {
	s.t.Helper()
	for _, p := range s.pickers {
		eventually(s.t, "no stream left", func() bool { return p.app.server.Streams() == 0 })
		if n := p.sum("baton_admission_held_bytes"); n != 0 {
			s.t.Errorf("%v body bytes still held", n)
		}
		if !p.stopped() { // estimates end with scrapes
			eventually(s.t, "no load left", func() bool { return p.load("") == 0 })
		}
	}
	eventually(s.t, "no KV block held", func() bool {
		for _, e := range s.pool.Engines() {
			if len(e.Held()) > 0 {
				return false
			}
		}
		return true
	})
	leaked, counted := 0, 0.0
	for _, e := range s.pool.Engines() {
		leaked += len(e.Leaked())
		for _, d := range e.Deaths() {
			s.t.Errorf("engine %s died: %+v", e.Name(), d)
		}
	}
	for _, p := range s.pickers {
		counted += p.sum("baton_sidecar_leaked_prefill_total")
	}
	if leaked != leaks || int(counted) != leaks {
		s.t.Errorf("engines leaked %d prefills, the picker counted %v, want %d", leaked, counted, leaks)
	}
}

// load is what the picker counts on the endpoints of a role ("" is all): requests and tokens.
func (p *picker) load(role string) (n int64) {
	for _, e := range p.app.Snapshot().Endpoints {
		if role == "" || e.Labels[pool.LabelRole] == role {
			n += e.Load.Requests() + e.Load.Tokens()
		}
	}
	return n
}

// sum adds up the series of a metric of a picker, which may have been stopped.
func (p *picker) sum(name string, labels ...string) (total float64) {
	families, err := p.app.registry.Gather()
	if err != nil {
		panic(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			match := 0
			for _, l := range m.GetLabel() {
				if slices.Contains(labels, l.GetValue()) {
					match++
				}
			}
			if match == len(labels) {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return total
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

// eventually polls until the condition holds or half a minute is over.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// seen counts the requests that the engines of a role saw.
func (s *stack) seen(role string) (n int) {
	for _, e := range s.pool.Engines() {
		if e.Role() == role {
			n += e.Stats().Requests
		}
	}
	return n
}
