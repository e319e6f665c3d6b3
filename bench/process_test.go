// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/baton-epp/baton/admission"
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/extproc"
	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scorers"
	"github.com/baton-epp/baton/sidecar"
)

// BenchmarkProcess is one request through the handler alone, without gRPC around it: what Baton does between receiving
// and sending, beside what the floor does there.
//
//	go test -run '^$' -bench Process -benchmem -cpuprofile cpu.pprof ./bench
func BenchmarkProcess(b *testing.B) {
	for _, size := range []int{4 << 10, 400 << 10} {
		for _, duplex := range []bool{false, true} {
			spec := loadSpec{PromptBytes: size, Piece: 16 << 10, FullDuplex: duplex, Chunks: 8}
			mode := "quiet"
			if duplex {
				mode = "full-duplex"
			}
			if size > 4<<10 {
				spec.Chunks = 200
			}
			name := fmt.Sprintf("prompt=%dKB/mode=%s/endpoints=100/server=", size>>10, mode)
			b.Run(name+"floor", func(b *testing.B) { benchmarkProcess(b, &floor{endpoints: []string{"10.0.0.1:8000"}}, &spec) })
			b.Run(name+"baton", func(b *testing.B) { benchmarkProcess(b, newBaton(b, 100), &spec) })
		}
	}
}

func benchmarkProcess(b *testing.B, server extprocv3.ExternalProcessorServer, spec *loadSpec) {
	b.Helper()
	s := newPlayback(b, spec)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.rewind(i)
		if err := server.Process(s); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if s.immediate || s.sent != s.answers {
		b.Fatalf("%d answers, want %d; immediate response: %v", s.sent, s.answers, s.immediate)
	}
}

// maxProcessAllocs is how many allocations one small quiet request may cost in the handler (docs/design.md: near the floor).
// Raise it only with a reason in the commit.
const maxProcessAllocs = 55

func TestProcessAllocations(t *testing.T) {
	server := newBaton(t, 100)
	s := newPlayback(t, &loadSpec{PromptBytes: 4 << 10, Piece: 16 << 10})
	i := 0
	alloctest.AtMost(t, maxProcessAllocs, "a small quiet request", func() {
		i++
		s.rewind(i)
		if err := server.Process(s); err != nil {
			t.Fatal(err)
		}
	})
	if s.immediate {
		t.Error("refused")
	}
}

// newBaton is the request path on n idle endpoints, without listeners and scraping.
func newBaton(tb testing.TB, n int) *extproc.Server {
	tb.Helper()
	check := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	cfg, err := config.Load("epp.yaml", []byte(strings.ReplaceAll(batonConfig, endpointsHole, "endpoints.yaml")))
	check(err)
	registry, logger := prometheus.NewRegistry(), slog.New(slog.DiscardHandler)
	s, err := scheduler.New(scheduler.Options{
		Config: cfg, File: "epp.yaml", Metrics: registry,
		Plugins: []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry()},
	})
	check(err)
	snapshot := pooltest.Idle(n)
	current := func() *pool.Snapshot { return snapshot }
	o, err := sidecar.New(sidecar.Options{Config: cfg.Disaggregation, Logger: logger, Registerer: registry, Snapshot: current})
	check(err)
	d, err := director.New(director.Options{
		Scheduler: func() director.Scheduler { return s }, Snapshot: current, Orchestrator: o, Logger: logger, Registerer: registry,
	})
	check(err)
	gate, err := admission.New(1 << 30)
	check(err)
	server, err := extproc.New(extproc.Options{
		Director: d, Gate: gate, MaxBodyBytes: 64 << 20, OverrideTimeout: func() time.Duration { return time.Minute },
		HoldResponse: o.HoldResponse, Logger: logger, Registerer: registry,
	})
	check(err)
	return server
}

// playback is a gateway's stream without a network: it hands out decoded messages and counts the answers.
type playback struct {
	grpc.ServerStream // nil: only what is below is called

	ctx       context.Context //nolint:containedctx // a stream has one
	messages  []*extprocv3.ProcessingRequest
	stamps    [][]byte // in messages, where the marker is
	answers   int      // expected
	next      int
	sent      int
	immediate bool
}

func newPlayback(tb testing.TB, spec *loadSpec) *playback {
	tb.Helper()
	script, err := newScript(1, spec)
	if err != nil {
		tb.Fatal(err)
	}
	headers, err := responseHeaders("192.168.1.1:8000")
	if err != nil {
		tb.Fatal(err)
	}
	s := &playback{ctx: tb.Context(), answers: len(script.request) + 1 + len(script.chunks)}
	for _, wire := range append(append(script.request, headers), script.chunks...) {
		m := &extprocv3.ProcessingRequest{}
		if err := proto.Unmarshal(wire, m); err != nil {
			tb.Fatal(err)
		}
		s.messages = append(s.messages, m)
		for _, h := range m.GetRequestHeaders().GetHeaders().GetHeaders() {
			s.mark(h.GetRawValue())
		}
		s.mark(m.GetRequestBody().GetBody())
	}
	return s
}

func (s *playback) mark(b []byte) {
	if i := strings.Index(string(b), marker); i >= 0 {
		s.stamps = append(s.stamps, b[i:i+len(marker)])
	}
}

// rewind starts the next request, with a prompt of its own.
func (s *playback) rewind(i int) {
	s.next, s.sent = 0, 0
	for _, place := range s.stamps {
		for digit := range place {
			place[digit] = 'a' + byte(uint64(i)*0x9e3779b97f4a7c15>>(4*digit))%16
		}
	}
}

func (s *playback) Context() context.Context { return s.ctx }

func (s *playback) Recv() (*extprocv3.ProcessingRequest, error) {
	if s.next == len(s.messages) {
		return nil, io.EOF
	}
	s.next++
	return s.messages[s.next-1], nil
}

func (s *playback) Send(m *extprocv3.ProcessingResponse) error {
	if m == nil {
		return errors.New("nil answer")
	}
	s.sent++
	s.immediate = s.immediate || m.GetImmediateResponse() != nil
	return nil
}
