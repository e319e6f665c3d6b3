// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/gatewaytest"
)

// orchestration measures what it costs that Baton issues the prefill itself: the time it adds to the same two HTTP calls
// made by hand, its CPU beside that of a request without prefill, and the memory of requests that are held.
type orchestration struct {
	out        string
	baton      string
	rounds     int
	round      time.Duration
	rate       float64 // requests a second, evenly spaced
	body       int     // bytes of a prompt
	held       int     // requests held at once
	heldBody   int     // bytes of each
	heldFor    time.Duration
	suite      *suite
	prefillers []string
	decoders   []string
}

// orchestrateConfig is a P/D configuration on the engines of baton simulate.
const orchestrateConfig = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, name: pool, parameters: {path: ENDPOINTS_FILE}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- {type: always-disagg-pd-decider}
- {type: approx-prefix-cache-producer}
- {type: prefill-filter}
- {type: decode-filter}
- {type: prefix-cache-scorer}
- {type: active-request-scorer}
- {type: max-score-picker}
dataLayer: {discovery: {pluginRef: pool}}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: prefix-cache-scorer}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
limits: {maxHeldBytes: 2Gi}
disaggregation: {mode: MODE, prefill: {maxConcurrentPerEndpoint: 2048}}
`

const modeHole = "MODE"

// Targets, shown beside what was measured.
const (
	addedP50Target = 500 * time.Microsecond
	addedP99Target = 3 * time.Millisecond
	cpuRatioTarget = 3.0
	heldTarget     = 600 << 20 // bytes
)

// orchestrateCommand is bench orchestrate.
func orchestrateCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o := &orchestration{}
	fs := flag.NewFlagSet("bench orchestrate", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.out, "out", "", "write a Markdown report to this `file`, such as bench/results/NAME.md")
	fs.StringVar(&o.baton, "baton", "", "Baton's `binary` (default: built from this module)")
	fs.IntVar(&o.rounds, "rounds", 8, "rounds; in each the calls by hand run first, then Baton with prefill, then without")
	fs.DurationVar(&o.round, "duration", 5*time.Second, "length of each part of a round")
	fs.Float64Var(&o.rate, "rate", 100, "requests a second, evenly spaced")
	fs.IntVar(&o.body, "body", 8<<10, "bytes of a prompt")
	fs.IntVar(&o.held, "held", 2000, "requests held at once; 0 leaves that part out")
	fs.IntVar(&o.heldBody, "held-body", 100<<10, "bytes of each of them")
	fs.DurationVar(&o.heldFor, "held-for", 5*time.Second, "how long the prefill endpoints keep them waiting once all are there")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 || o.rounds < 1 || o.round < 100*time.Millisecond || o.rate <= 0 || o.body < 1 || o.held < 0 || o.heldBody < 1 {
		return errors.New("-rounds, -rate, -body and -held-body must be positive, -duration 100ms or more, and no argument may follow")
	}
	return o.run(ctx, stdout, stderr)
}

func (o *orchestration) run(ctx context.Context, stdout, progress io.Writer) error {
	dir, err := os.MkdirTemp("", "baton-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	o.suite = &suite{opts: &options{Baton: o.baton}, dir: dir, progress: progress, launcher: launcher{}}
	if err := o.suite.build(ctx); err != nil {
		return err
	}
	engines, err := o.engines(ctx)
	if err != nil {
		return err
	}
	defer engines.stop()
	r := &orchestrated{machine: machineNow(ctx), o: o}
	began := time.Now()
	if err := o.compare(ctx, r); err != nil {
		return err
	}
	if o.held > 0 {
		if err := o.hold(ctx, r); err != nil {
			return err
		}
	}
	r.took = time.Since(began)
	fmt.Fprint(stdout, r.text())
	if o.out == "" {
		return nil
	}
	return os.WriteFile(o.out, []byte(r.text()), 0o600) //nolint:gosec // the report that was asked for
}

// engines starts two prefill and two decode endpoints that take no time of their own.
func (o *orchestration) engines(ctx context.Context) (*child, error) {
	ports, err := freePorts(ctx, 1)
	if err != nil {
		return nil, err
	}
	base := ports[0]
	c, err := o.suite.launcher.start(ctx, false, o.suite.baton, nil, "simulate", "--prefill", "2", "--decode", "2",
		"--base-port", strconv.Itoa(base), "--endpoints-file", o.suite.endpointsFile(), "--prefill-fixed", "1ns",
		"--prefill-per-token", "1ns", "--transfer-fixed", "1ns", "--transfer-per-token", "1ns", "--inter-token", "1ns",
		"--handshake", "1ns", "--num-blocks", "200000", "--max-num-seqs", "8192", "--max-model-len", "200000", "--seed", "1")
	if err != nil {
		return nil, err
	}
	o.prefillers, o.decoders = []string{local(base), local(base + 1)}, []string{local(base + 2), local(base + 3)}
	for start := time.Now(); ; {
		resp, err := http.Get("http://" + o.decoders[1] + "/health") //nolint:noctx // on loopback, and bounded by startLimit
		if err == nil {
			_ = resp.Body.Close()
			return c, nil
		}
		if time.Since(start) > startLimit || !wait(ctx, 50*time.Millisecond) {
			c.stop()
			return nil, c.failure(fmt.Errorf("engines do not answer: %w", err))
		}
	}
}

// picker starts a Baton in a mode, with a folder of its own: a shared configuration file would be reloaded by both.
func (o *orchestration) picker(ctx context.Context, mode string) (*server, error) {
	own := *o.suite
	own.dir = filepath.Join(o.suite.dir, mode)
	if err := os.MkdirAll(own.dir, 0o700); err != nil {
		return nil, err
	}
	text := strings.NewReplacer(modeHole, mode, endpointsHole, o.suite.endpointsFile()).Replace(orchestrateConfig)
	own.opts = &options{Config: filepath.Join(own.dir, "source.yaml")}
	if err := os.WriteFile(own.opts.Config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	return own.startBaton(ctx, own.baton, mode)
}

// compare runs the rounds.
func (o *orchestration) compare(ctx context.Context, r *orchestrated) error {
	with, err := o.picker(ctx, "orchestrate")
	if err != nil {
		return err
	}
	defer with.stop()
	without, err := o.picker(ctx, "off")
	if err != nil {
		return err
	}
	defer without.stop()
	hand := &byHand{o: o, up: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true}}
	for i := range o.rounds {
		o.suite.say("round %d of %d ...", i+1, o.rounds)
		byHand, err := o.paced(ctx, hand.do)
		if err != nil {
			return fmt.Errorf("by hand: %w", err)
		}
		orchestrated, cpu, err := o.through(ctx, with)
		if err != nil {
			return fmt.Errorf("with prefill: %w", err)
		}
		_, plain, err := o.through(ctx, without)
		if err != nil {
			return fmt.Errorf("without prefill: %w", err)
		}
		r.add(byHand, orchestrated, cpu, plain)
	}
	return nil
}

// through sends a part of a round through a picker, and measures its CPU per request.
func (o *orchestration) through(ctx context.Context, on *server) (times []time.Duration, cpu time.Duration, err error) {
	g, err := gatewaytest.New(gatewaytest.Options{Picker: on.addr, Request: gatewaytest.Duplex})
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = g.Close() }()
	before, err := cpuOf(on.pid())
	if err != nil {
		return nil, 0, err
	}
	times, err = o.paced(ctx, func(ctx context.Context, n int, body []byte) error {
		reply, err := g.Do(ctx, "/v1/chat/completions", body, "x-request-id", fmt.Sprintf("%s-%d-%d", on.label, time.Now().UnixNano(), n))
		switch {
		case err != nil:
			return err
		case reply.Status != http.StatusOK:
			return fmt.Errorf("status %d: %s", reply.Status, reply.Body)
		case reply.Header.Get("x-baton-outcome") != map[string]string{"orchestrate": "disaggregated", "off": "aggregated"}[on.label]:
			return fmt.Errorf("outcome %q", reply.Header.Get("x-baton-outcome"))
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	after, err := cpuOf(on.pid())
	return times, (after - before) / time.Duration(max(1, len(times))), err
}

// paced sends requests evenly spaced and returns how long each took, in ascending order.
func (o *orchestration) paced(ctx context.Context, send func(ctx context.Context, n int, body []byte) error) ([]time.Duration, error) {
	var (
		mu       sync.Mutex
		times    []time.Duration
		firstErr error
		running  sync.WaitGroup
	)
	total := int(o.rate * o.round.Seconds())
	start := time.Now()
	for n := range total {
		if !wait(ctx, time.Until(start.Add(time.Duration(float64(n)/o.rate*float64(time.Second))))) {
			break
		}
		body := promptOf(n, o.body)
		running.Go(func() {
			began := time.Now()
			err := send(ctx, n, body)
			mu.Lock()
			defer mu.Unlock()
			times = append(times, time.Since(began))
			if firstErr == nil {
				firstErr = err
			}
		})
	}
	running.Wait()
	slices.Sort(times)
	return times, errors.Join(firstErr, ctx.Err())
}

// promptOf is a chat request with a prompt of size bytes of its own.
func promptOf(n, size int) []byte {
	text := prose(n, size)
	return fmt.Appendf(nil, `{"model":"tiny","max_tokens":1,"temperature":0,"messages":[{"role":"user","content":%q}]}`, text)
}

// byHand makes the two calls that Baton and the gateway make, and nothing else.
type byHand struct {
	o  *orchestration
	up *http.Transport
}

func (h *byHand) do(ctx context.Context, n int, body []byte) error {
	open := body[:len(body)-1]
	answer, err := h.post(ctx, h.o.prefillers[n%2], slices.Concat(open, []byte(`,"stream":false,"kv_transfer_params":{"do_remote_decode":true}}`)))
	if err != nil {
		return fmt.Errorf("prefill: %w", err)
	}
	handle, _, err := inference.Field(answer, "kv_transfer_params")
	if err != nil || len(handle) == 0 {
		return fmt.Errorf("prefill answered without a handle: %.200s", answer)
	}
	if _, err = h.post(ctx, h.o.decoders[n%2], slices.Concat(open, []byte(`,"kv_transfer_params":`), handle, []byte("}"))); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	return nil
}

func (h *byHand) post(ctx context.Context, host string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+host+"/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.up.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %.200s", resp.StatusCode, text)
	}
	return text, err
}

// hold keeps requests waiting for their prefill and reads the picker's memory meanwhile.
func (o *orchestration) hold(ctx context.Context, r *orchestrated) error {
	o.suite.say("holding %d requests of %d bytes ...", o.held, o.heldBody)
	on, err := o.picker(ctx, "orchestrate")
	if err != nil {
		return err
	}
	defer on.stop()
	r.idlePeak = peakOf(on.pid())
	fault := `{"rules":[{"phase":"prefill","kind":"hang"}]}`
	for _, p := range o.prefillers {
		resp, err := http.Post("http://"+p+"/admin/faults", "application/json", strings.NewReader(fault)) //nolint:noctx // on loopback
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
	}
	g, err := gatewaytest.New(gatewaytest.Options{Picker: on.addr, Request: gatewaytest.Duplex})
	if err != nil {
		return err
	}
	defer func() { _ = g.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	for n := range o.held {
		body := promptOf(n, o.heldBody)
		running.Go(func() { _, _ = g.Do(ctx, "/v1/chat/completions", body) }) // ended by cancel
		wait(ctx, time.Millisecond)
	}
	for waited := time.Duration(0); r.heldSeen < o.held && waited < time.Minute; waited += 100 * time.Millisecond {
		if r.heldSeen, r.heldBytes, err = heldNow(ctx, on.metrics); err != nil {
			return err
		}
		wait(ctx, 100*time.Millisecond)
	}
	wait(ctx, o.heldFor)
	r.heldPeak = peakOf(on.pid())
	cancel()
	running.Wait()
	return nil
}

// heldNow reads how many prefills are in flight, and the bytes of their bodies.
func heldNow(ctx context.Context, metrics string) (n int, size int64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metrics+"/metrics", nil)
	if err != nil {
		return 0, 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	for line := range strings.SplitSeq(string(text), "\n") {
		if v, ok := strings.CutPrefix(line, `baton_sidecar_in_flight{phase="prefill"} `); ok {
			f, _ := strconv.ParseFloat(v, 64) // our own page
			n = int(f)
		}
		if v, ok := strings.CutPrefix(line, "baton_admission_held_bytes "); ok {
			f, _ := strconv.ParseFloat(v, 64)
			size = int64(f)
		}
	}
	return n, size, err
}
