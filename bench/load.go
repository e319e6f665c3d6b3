// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// loadSpec is one round of load on one server.
type loadSpec struct {
	Target      string        `json:"target"` // ip:port of the ext_proc server
	PID         int           `json:"pid"`    // whose CPU time is read at both ends of the measured part; 0 is nobody
	PromptBytes int           `json:"prompt_bytes"`
	Chunks      int           `json:"chunks"` // of the response, in full-duplex mode
	FullDuplex  bool          `json:"full_duplex"`
	Burst       bool          `json:"burst"`
	Piece       int           `json:"piece"`
	Concurrency int           `json:"concurrency"`
	Connections int           `json:"connections"`
	Rate        float64       `json:"rate"` // requests a second; 0 is no pause
	Warmup      time.Duration `json:"warmup"`
	Duration    time.Duration `json:"duration"`
}

// loadResult is what came of it.
type loadResult struct {
	Requests int           `json:"requests"` // that ended in the measured part
	Errors   int           `json:"errors"`   // over the whole round
	Error    string        `json:"error"`    // the first one
	Elapsed  time.Duration `json:"elapsed"`  // the measured part
	CPU      time.Duration `json:"cpu"`      // of the server in it
	P50      time.Duration `json:"p50"`      // decision latency
	P99      time.Duration `json:"p99"`
}

// loadCommand runs one round and prints its result.
func loadCommand(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	fs := flag.NewFlagSet("bench load", flag.ContinueOnError)
	text := fs.String("spec", "", "the round as `JSON`; see loadSpec")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var spec loadSpec
	if err := json.Unmarshal([]byte(*text), &spec); err != nil {
		return fmt.Errorf("-spec: %w", err)
	}
	ctx, cancel := untilEOF(ctx, stdin)
	defer cancel()
	result, err := load(ctx, spec)
	if err != nil {
		return err
	}
	return writeLine(stdout, result)
}

// client is the load of one round. Its counters are atomic: workers write, load reads.
type client struct {
	spec    loadSpec
	workers []*worker

	measuring atomic.Bool
	requests  atomic.Int64 // that ended while measuring
	stamps    atomic.Uint64
	turns     atomic.Int64 // requests taken from the schedule

	mu     sync.Mutex
	errors int   // guarded by mu
	first  error // guarded by mu
}

const (
	windowBytes  = 1 << 20
	connWindow   = 16 << 20
	maxMessage   = 65 << 20
	errorPause   = 10 * time.Millisecond // so that a dead server is not hammered
	settleAfter  = 20 * time.Second      // for requests under way when a round ends
	longestWait  = 60 * time.Second      // for the first request to end, behind a measured part that saw none
	waitStep     = 10 * time.Millisecond // between two looks
	latencyGuess = 1 << 14
)

// load runs one round.
func load(ctx context.Context, spec loadSpec) (*loadResult, error) {
	c := &client{spec: spec}
	conns, err := dial(spec.Target, spec.Connections)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	if err := c.prepare(conns); err != nil {
		return nil, err
	}
	sending, stop := context.WithCancel(ctx) // no new requests after it
	defer stop()
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	start := time.Now()
	for _, w := range c.workers {
		all.Go(func() { c.work(sending, running, w, start) })
	}
	result, err := c.measure(ctx)
	stop()
	late := time.AfterFunc(settleAfter, cancel)
	defer late.Stop()
	all.Wait()
	if err != nil {
		return nil, err
	}
	c.finish(result)
	return result, nil
}

func dial(target string, n int) ([]*grpc.ClientConn, error) {
	conns := make([]*grpc.ClientConn, 0, n)
	for range n {
		conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithInitialWindowSize(windowBytes), grpc.WithInitialConnWindowSize(connWindow),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{}), grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
		if err != nil {
			return nil, fmt.Errorf("dial: %w", err)
		}
		conns = append(conns, conn)
	}
	return conns, nil
}

// prepare makes the workers, with their messages.
func (c *client) prepare(conns []*grpc.ClientConn) error {
	salt := rand.Uint64() // so that no round repeats the prompts of another
	stamp := func() []byte { return fmt.Appendf(nil, "%016x", salt+c.stamps.Add(1)*0x9e3779b97f4a7c15) }
	scripts := make([]*script, min(groups, c.spec.Concurrency))
	for i := range scripts {
		var err error
		if scripts[i], err = newScript(i, &c.spec); err != nil {
			return err
		}
	}
	for i := range c.spec.Concurrency {
		c.workers = append(c.workers, &worker{
			conn: conns[i%len(conns)], script: scripts[i%len(scripts)], burst: c.spec.Burst,
			served: map[string]encoded{}, stamp: stamp, latencies: make([]time.Duration, 0, latencyGuess),
		})
	}
	return nil
}

// work sends requests until sending ends. With a rate, request k is due k/rate after start, whoever sends it.
func (c *client) work(sending, running context.Context, w *worker, start time.Time) {
	for sending.Err() == nil {
		if c.spec.Rate > 0 {
			due := start.Add(time.Duration(float64(c.turns.Add(1)) / c.spec.Rate * float64(time.Second)))
			if !wait(sending, time.Until(due)) {
				return
			}
		}
		latency, err := w.exchange(running)
		switch {
		case err != nil && running.Err() == nil:
			c.failed(err)
			wait(sending, errorPause)
		case err == nil && c.measuring.Load():
			c.requests.Add(1)
			w.latencies = append(w.latencies, latency)
		}
	}
}

func (c *client) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.errors++; c.first == nil {
		c.first = err
	}
}

func (c *client) anyFailed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.errors > 0
}

// measure waits out the warm-up, then reads clock, counter and CPU time at both ends of the measured part. That part
// goes on until a request ended, well or not: on a slow machine the duration asked for may be too short for one.
func (c *client) measure(ctx context.Context) (*loadResult, error) {
	if !wait(ctx, c.spec.Warmup) {
		return nil, context.Cause(ctx)
	}
	before, err := c.cpu()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	c.measuring.Store(true)
	for d := c.spec.Duration; ; d = waitStep {
		if !wait(ctx, d) {
			return nil, context.Cause(ctx)
		}
		if c.requests.Load() > 0 || c.anyFailed() || time.Since(began) > c.spec.Duration+longestWait {
			break
		}
	}
	c.measuring.Store(false)
	r := &loadResult{Requests: int(c.requests.Load()), Elapsed: time.Since(began)}
	after, err := c.cpu()
	r.CPU = after - before
	return r, err
}

func (c *client) cpu() (time.Duration, error) {
	if c.spec.PID == 0 {
		return 0, nil
	}
	return cpuOf(c.spec.PID)
}

// finish adds what is known once all workers have ended.
func (c *client) finish(r *loadResult) {
	var all []time.Duration
	for _, w := range c.workers {
		all = append(all, w.latencies...)
	}
	slices.Sort(all)
	r.P50, r.P99 = percentile(all, 0.5), percentile(all, 0.99)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == nil && r.Requests == 0 {
		c.first = errors.New("no request ended in the measured part")
	}
	if r.Errors = c.errors; c.first != nil {
		r.Error = c.first.Error()
	}
}

// wait returns false when ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
