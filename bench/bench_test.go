// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
)

// TestMain lets the comparison start the test binary as one of its parts.
func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestSpreadOf(t *testing.T) {
	f := func(values []float64, want spread) {
		t.Helper()
		if diff := cmp.Diff(want, spreadOf(values), cmpopts.EquateNaNs()); diff != "" {
			t.Errorf("spreadOf(%v): %s", values, diff)
		}
	}
	nan := math.NaN()
	f(nil, spread{nan, nan, nan})
	f([]float64{nan}, spread{nan, nan, nan})
	f([]float64{3}, spread{3, 3, 3})
	f([]float64{3, 1, 2}, spread{2, 1, 3})
	f([]float64{4, 1, nan, 2, 3}, spread{2.5, 1, 4})
}

func TestRatios(t *testing.T) {
	f := func(of, by, want []float64) {
		t.Helper()
		if diff := cmp.Diff(want, ratios(of, by), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("ratios(%v, %v): %s", of, by, diff)
		}
	}
	f(nil, nil, nil)
	f([]float64{3, 8}, []float64{2, 4}, []float64{1.5, 2})
	f([]float64{3, 8}, []float64{0, 4}, []float64{2})
	f(nil, []float64{2}, nil)
}

func TestPercentile(t *testing.T) {
	f := func(sorted []time.Duration, q float64, want time.Duration) {
		t.Helper()
		if got := percentile(sorted, q); got != want {
			t.Errorf("percentile(%v, %v) = %v, want %v", sorted, q, got, want)
		}
	}
	f(nil, 0.5, 0)
	f([]time.Duration{7}, 0.99, 7)
	f([]time.Duration{1, 2, 3, 4}, 0.5, 2)
	f([]time.Duration{1, 2, 3, 4}, 0.51, 3)
	f([]time.Duration{1, 2, 3, 4}, 0.99, 4)
	f([]time.Duration{1, 2, 3, 4}, 0, 1)
}

func TestParseStat(t *testing.T) {
	const numbers = " S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0"
	got, err := parseStat([]byte("42 (a) b (c))" + numbers))
	if want := 1750 * time.Millisecond; err != nil || got != want {
		t.Errorf("parseStat = %v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"", "42 (a) S 1 2", "42 (a)" + strings.Replace(numbers, "150", "x", 1)} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parseStat(%q): no error", bad)
		}
	}
}

func TestTail(t *testing.T) {
	var kept tail
	for range 3 {
		if _, err := kept.Write(bytes.Repeat([]byte("a"), tailBytes-1)); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprint(&kept, "the end\n")
	if got := kept.String(); len(got) > tailBytes || !strings.HasSuffix(got, "athe end") {
		t.Errorf("tail keeps %d bytes, ending in %q", len(got), got[max(0, len(got)-20):])
	}
}

// TestScript reads the messages back as a server does.
func TestScript(t *testing.T) {
	for _, piece := range []int{1 << 10, 16 << 10, 1 << 20} {
		for _, size := range []int{4 << 10, 400 << 10} {
			t.Run(fmt.Sprintf("size=%d,piece=%d", size, piece), func(t *testing.T) { testScript(t, size, piece) })
		}
	}
}

func testScript(t *testing.T, size, piece int) {
	t.Helper()
	s, err := newScript(3, &loadSpec{PromptBytes: size, Piece: piece, FullDuplex: true, Chunks: 8})
	if err != nil {
		t.Fatal(err)
	}
	const stamp = "0123456789abcdef"
	var body []byte
	for i := range s.request {
		var m extprocv3.ProcessingRequest
		if err := proto.Unmarshal(s.stamped(i, []byte(stamp)), &m); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if n := len(m.GetRequestHeaders().GetHeaders().GetHeaders()); n < 15 || m.GetProtocolConfig().GetRequestBodyMode() != modeDuplex {
				t.Errorf("first message: %d headers, %v", n, m.GetProtocolConfig())
			}
			continue
		}
		part := m.GetRequestBody()
		body = append(body, part.GetBody()...)
		if last := i == len(s.request)-1; part.GetEndOfStream() != last || len(part.GetBody()) > piece {
			t.Errorf("message %d: end_of_stream %v, %d bytes", i, part.GetEndOfStream(), len(part.GetBody()))
		}
	}
	var chat struct{ Messages []chatMessage }
	if err := json.Unmarshal(body, &chat); err != nil {
		t.Fatal(err)
	}
	if len(chat.Messages) != 2 || !strings.HasPrefix(chat.Messages[1].Content, stamp+" ") || bytes.Contains(body, []byte(marker)) {
		t.Errorf("%d messages, the stamp is not at the head of the second", len(chat.Messages))
	}
	if len(body) != s.bodyBytes || len(body) < size*9/10 || len(body) > size*12/10 {
		t.Errorf("body of %d bytes, want about %d; script says %d", len(body), size, s.bodyBytes)
	}
	if len(s.chunks) != 9 {
		t.Errorf("%d response messages, want 8 events and an empty end", len(s.chunks))
	}
}

// TestAnswer compares the reader of the load with the real decoder.
func TestAnswer(t *testing.T) {
	f := func(m *extprocv3.ProcessingResponse, want answer) {
		t.Helper()
		wire, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var got answer
		if err := got.read(wire); err != nil {
			t.Errorf("%v: %v", m, err)
		}
		if got.headers != nil && !proto.Equal(got.headers, m) {
			t.Errorf("decoded %v, want %v", got.headers, m)
		}
		got.headers = nil
		if got != want {
			t.Errorf("read %+v, want %+v", got, want)
		}
		for cut := range wire { // must not panic, whatever it says
			_ = got.read(wire[:cut])
		}
	}
	f(requestChunk([]byte("hello"), false), answer{kind: fieldRequestBody, bytes: 5})
	f(requestChunk([]byte("hello"), true), answer{kind: fieldRequestBody, bytes: 5, over: true})
	f(responseChunk(nil, true), answer{kind: fieldResponseBody, over: true})
	f(responseHeadersPass, answer{kind: fieldResponseHeaders})
	f((&floor{endpoints: []string{"10.0.0.1:8000"}}).pick(), answer{kind: fieldRequestHeaders})
	f(&extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ImmediateResponse{
		ImmediateResponse: &extprocv3.ImmediateResponse{Body: []byte("no")},
	}}, answer{kind: fieldImmediate})
}

// TestFloor sends each kind of traffic through the load client; the client itself checks every answer.
func TestFloor(t *testing.T) {
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newFloor([]string{"10.0.0.1:8000", "[::1]:8000"})
	defer server.Stop()
	go func() { _ = server.Serve(ln) }() // ends with Stop
	base := loadSpec{
		Target: ln.Addr().String(), PID: os.Getpid(), PromptBytes: 4 << 10, Chunks: 8, Piece: 16 << 10,
		Concurrency: 3, Connections: 2, Warmup: 20 * time.Millisecond, Duration: 150 * time.Millisecond,
	}
	for name, change := range map[string]func(*loadSpec){
		"quiet":       func(*loadSpec) {},
		"full-duplex": func(s *loadSpec) { s.FullDuplex = true },
		"burst":       func(s *loadSpec) { s.FullDuplex, s.Burst = true, true },
		"large":       func(s *loadSpec) { s.PromptBytes, s.Chunks, s.FullDuplex = 400<<10, 200, true },
		"large piece": func(s *loadSpec) { s.PromptBytes, s.Piece = 400<<10, 1<<20 },
		"paced":       func(s *loadSpec) { s.Rate = 100 },
	} {
		t.Run(name, func(t *testing.T) {
			spec := base
			change(&spec)
			began := time.Now()
			r, err := load(t.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			if r.Error != "" || r.Requests == 0 || r.P50 <= 0 || r.P99 < r.P50 {
				t.Errorf("result %+v", r)
			}
			// Those due in the warm-up may end late, and so count in the measured part.
			if took := time.Since(began); spec.Rate > 0 && float64(r.Requests) > spec.Rate*took.Seconds() {
				t.Errorf("%d requests in %v at %v/s", r.Requests, took, spec.Rate)
			}
		})
	}
}

// TestMeasureUntilOneEnds: a measured part too short for any request goes on until one has ended.
func TestMeasureUntilOneEnds(t *testing.T) {
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newFloor([]string{"10.0.0.1:8000"})
	defer server.Stop()
	late := time.AfterFunc(300*time.Millisecond, func() { _ = server.Serve(ln) }) // ends with Stop
	defer late.Stop()
	r, err := load(t.Context(), loadSpec{
		Target: ln.Addr().String(), PromptBytes: 1 << 10, Piece: 16 << 10, Concurrency: 1, Connections: 1, Duration: time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Error != "" || r.Requests == 0 || r.P50 <= 0 {
		t.Errorf("result %+v", r)
	}
}

// TestLoadFailure has the load meet a port that refuses: it must end in time and say why.
func TestLoadFailure(t *testing.T) {
	r, err := load(t.Context(), loadSpec{
		Target: local(1), PromptBytes: 1 << 10, Piece: 16 << 10, Concurrency: 1, Connections: 1, Duration: 100 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Errors == 0 || !strings.Contains(r.Error, "refused") {
		t.Errorf("result %+v, want refused connections", r)
	}
}

// TestQuick runs the comparison in miniature, in its own processes, against the floor alone.
func TestQuick(t *testing.T) {
	report := filepath.Join(t.TempDir(), "results", "report.md")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var table, progress strings.Builder
	if err := command(ctx, []string{"-quick", "-floor-only", "-out", report}, strings.NewReader(""), &table, &progress); err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	saved, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{table.String(), string(saved)} {
		for _, want := range []string{"prompt=4KB/chunks=8/mode=quiet/endpoints=10", "prompt=400KB/chunks=200/mode=full-duplex/endpoints=10", "machine: "} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in\n%s", want, text)
			}
		}
	}
}

func TestOptions(t *testing.T) {
	for _, bad := range [][]string{
		{"-rounds", "0"},
		{"-duration", "1h"},
		{"-piece", "1"},
		{"-case", "("},
		{"extra"},
		{"-cpuprofile", "x", "-floor-only"},
	} {
		if _, err := parseOptions(bad, io.Discard); err == nil {
			t.Errorf("%v: no error", bad)
		}
	}
	o, err := parseOptions(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if all := cases(o); len(all) != 8 {
		t.Errorf("%d cases, want 8", len(all))
	}
	rounds := float64(len(cases(o)) * o.Rounds * 2)
	if total := rounds*(o.Warmup+o.Duration).Seconds() + o.Idle.Seconds(); total > 360 {
		t.Errorf("a full run has %.0f s of load and waiting alone, it must end within 8 minutes", total)
	}
}
