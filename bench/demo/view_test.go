// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func l4(port int) netip.AddrPort { return netip.MustParseAddrPort(loopback(port)) }

func testSnapshot() snapshot {
	t := newTally()
	t.pool([]endpointState{
		{Endpoint: "default/decode-0", Role: "decode", Ready: true, Fresh: true, Running: 3, KVCache: 0.42, InFlight: 4, Standing: "healthy"},
		{Endpoint: "default/decode-1", Role: "decode", Ready: true, Fresh: true, Queue: 12, Running: 256, KVCache: 1, InFlight: 1300, Standing: "healthy"},
		{Endpoint: "default/decode-2", Role: "decode", Ready: true, Standing: "healthy"},
		{Endpoint: "default/prefill-0", Role: "prefill", Ready: true, Fresh: true, Standing: "ejected"},
		{Endpoint: "default/prefill-1", Role: "prefill", Fresh: true, Running: 1, KVCache: 0.07, InFlight: 1, Standing: "healthy"},
	})
	for i := range 30 {
		id := fmt.Sprintf("demo-%04d", i+1)
		t.sent(chat{ID: id})
		d := testDecision(id, i%2)
		switch i {
		case 29:
			continue // sent just now
		case 28:
			d.Outcome, d.Reasons = outcomeAggregated, map[string]string{phasePrefill: "short prompt"}
		case 27:
			d.Outcome = "fallback-prefill-failed"
		case 24:
			d = fewLeft(id)
		}
		t.decide(d)
		r := result{ID: id, FirstToken: time.Duration(i) * 10 * time.Millisecond, Outcome: d.Outcome}
		if i == 26 {
			r.Err = errors.New("status 503: {\"error\": {\"message\":\n\"\x1b[31mno endpoint\"}}")
		}
		if i == 23 {
			r = result{ID: id, Err: errors.New("context canceled"), Stopped: true}
		}
		if i != 25 {
			t.done(r)
		}
	}
	s := t.snapshot()
	s.Elapsed = 83 * time.Second
	return s
}

// TestView compares frames with golden files, and checks that none is larger than the terminal.
func TestView(t *testing.T) {
	try := (&demo{stack: stack{o: options{PortBase: 65000}}}).try()
	for _, f := range []frame{
		{Title: "Baton demo", Try: try, Width: 80, Height: 24},
		{Title: "Baton demo", Try: try, Width: 132, Height: 40},
		{Title: "Baton demo", Width: 20, Height: 5, ASCII: true}, // too small: drawn for 80 x 24
	} {
		lines := f.lines(testSnapshot())
		if limit := max(f.Height, minHeight); len(lines) >= limit {
			t.Errorf("%dx%d: %d lines", f.Width, f.Height, len(lines))
		}
		for _, l := range lines {
			if n := width(l); n > max(f.Width, minWidth) || slices.Contains(try, l) && n >= minWidth {
				t.Errorf("%dx%d: a line has %d columns: %q", f.Width, f.Height, n, l)
			}
			if bare := strings.NewReplacer(bold, "", dim, "", red, "", plain, "").Replace(l); strings.ContainsAny(bare, "\x1b\n") || !utf8.ValidString(bare) {
				t.Errorf("%dx%d: control characters in %q", f.Width, f.Height, l)
			}
		}
		file := filepath.Join("testdata", fmt.Sprintf("view-%dx%d.txt", f.Width, f.Height))
		got := strings.NewReplacer(bold, "", dim, "", red, "", plain, "").Replace(strings.Join(lines, "\n")) + "\n"
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s differs: run go test ./bench/demo -update and look\n%s", file, got)
		}
	}
}

// fewLeft is a decision for no prefill: of 1,000 tokens the decode endpoint holds 8 blocks of 64.
func fewLeft(id string) decision {
	var d decision
	text := fmt.Sprintf(`{"request_id":%q,"prompt_tokens":1000,"prompt_blocks":16,"outcome":"aggregated","picks":{"decode":"default/decode-1"},
		"reasons":{"prefill":"prompt cached on the decode endpoint"},
		"profiles":[{"phase":"decode","endpoints":[{"endpoint":"default/decode-1","matched_blocks":8}]}]}`, id)
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		panic(err)
	}
	return d
}

// TestStopped checks that requests under way when the user ends the demo are not told as failures.
func TestStopped(t *testing.T) {
	entered := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) //nolint:errcheck // the server notices that the client left only when the body was read
		close(entered)
		<-r.Context().Done()
	}))
	defer s.Close()
	c := &client{http: newHTTPClient(), base: s.URL}
	defer c.http.CloseIdleConnections()
	ctx, end := context.WithCancel(t.Context())
	seen := newTally()
	one := []chat{{ID: "demo-0001"}}
	go func() { <-entered; end() }()
	replay(ctx, ctx, c, func() (chat, bool) {
		if len(one) == 0 {
			return chat{}, false
		}
		r := one[0]
		one = nil
		return r, true
	}, seen.sent, seen.done)
	got := seen.snapshot()
	if want := (totals{Sent: 1, Stopped: 1}); got.Totals != want {
		t.Errorf("totals %+v, want %+v", got.Totals, want)
	}
	if l := line(got.Rows[0]); !strings.HasSuffix(l, "stopped") {
		t.Errorf("line %q", l)
	}
}

func TestSummary(t *testing.T) {
	good := func() *summary {
		return &summary{
			snapshot: snapshot{Totals: totals{Sent: 80, Answered: 80, Disaggregated: 50, PrefixHits: 12}},
			ledger:   ledger{Pulls: 50, PulledTokens: 41000, CachedTokens: 900},
		}
	}
	f := func(name string, spoil func(*summary), want string) {
		t.Helper()
		s := good()
		spoil(s)
		if got := strings.Join(s.problems(), "\n"); got != want {
			t.Errorf("%s: problems %q, want %q", name, got, want)
		}
	}
	f("good", func(*summary) {}, "")
	f("failure", func(s *summary) {
		s.snapshot.Totals.Answered, s.snapshot.Totals.Failed, s.snapshot.Totals.FirstError = 79, 1, "demo-0003: status 503"
	}, "1 requests failed, the first one demo-0003: status 503")
	f("unanswered", func(s *summary) { s.snapshot.Totals.Sent++ }, "1 requests were never answered")
	f("few", func(s *summary) { s.snapshot.Totals.Disaggregated = 23 }, "only 28% of the requests were disaggregated, 30% at least are expected")
	f("no pulls", func(s *summary) { s.ledger.Pulls = 0 }, "no KV blocks moved between the model servers")
	f("leak", func(s *summary) { s.ledger.Leaked = 2 }, "2 finished prefills were never collected")
	f("held", func(s *summary) { s.ledger.Held = 1 }, "1 uses of KV blocks were not over at the end")
	f("wrong", func(s *summary) { s.ledger.Wrong = 1 }, "1 transfers of KV blocks went wrong")
	f("cold", func(s *summary) { s.snapshot.Totals.PrefixHits = 0 }, "no request went to a server that knew the start of its prompt")
	f("different", func(s *summary) { s.compared, s.equal = 5, 4 }, "1 of 5 answers differ from the aggregated ones")
	f("left", func(s *summary) { s.left = []string{"envoy"} }, "something of envoy is still running")
	if text := good().String(); !strings.Contains(text, "62% (50) were prefilled on one server") || !strings.Contains(text, "41,000 prompt tokens") {
		t.Errorf("summary:\n%s", text)
	}
}

// TestPlan checks what the texts must have: shared prefixes, lengths, arrivals spread over the ticks, repeatability.
func TestPlan(t *testing.T) {
	trace := []record{
		{Timestamp: 9000, InputLength: 2048, OutputLength: 80, HashIDs: []uint64{0, 7, 8, 9}},
		{Timestamp: 9000, InputLength: 1300, OutputLength: 3, HashIDs: []uint64{0, 7, 10}},
		{Timestamp: 12000, InputLength: 300, OutputLength: 80, HashIDs: []uint64{0}},
	}
	byLength := func(pass int, p pace) map[int]chat {
		out := map[int]chat{}
		for _, c := range plan(trace, p, pass) {
			out[len(c.System)+len(c.User)] = c
		}
		return out
	}
	p := pace{Divisor: 8, Speed: 2}
	first := byLength(0, p)
	long, short, tiny := first[2048/8*4], first[1300/8*4], first[256+len("go on")]
	if long.ID == "" || short.ID == "" || tiny.ID == "" {
		t.Fatalf("lengths are not an eighth of the trace's: %v", first)
	}
	if long.System != short.System || long.System != tiny.System || long.User[:256] != short.User[:256] || long.User[:300] == short.User[:300] {
		t.Error("prompts must share exactly the blocks whose ids they share")
	}
	if long.MaxTokens != 10 || short.MaxTokens != 2 {
		t.Errorf("max tokens %d and %d, want 10 and 2", long.MaxTokens, short.MaxTokens)
	}
	if long.At == short.At || long.At >= tick || tiny.At < tick/2 {
		t.Errorf("arrivals %v, %v and %v", long.At, short.At, tiny.At)
	}
	if again := byLength(0, p); again[1024] != long {
		t.Error("the same pass gives other requests")
	}
	if next := byLength(1, p)[1024]; next.System != long.System || next.User == long.User {
		t.Error("a further pass must share the first block and nothing else")
	}
	p.MaxPromptBytes = 700
	if cut := byLength(0, p); cut[700].ID == "" {
		t.Error("prompts are not cut")
	}
}

// TestSequence checks that passes follow each other.
func TestSequence(t *testing.T) {
	trace := []record{{Timestamp: 0, InputLength: 800, HashIDs: []uint64{0, 1}}, {Timestamp: 6000, InputLength: 800, HashIDs: []uint64{0, 2}}}
	next := sequence(trace, pace{Divisor: 8, Speed: 1}, true)
	var last time.Duration
	seen := map[string]bool{}
	for range 7 {
		c, ok := next()
		if !ok || c.At < last || seen[c.ID] {
			t.Fatalf("request %v after %v, ok %v", c, last, ok)
		}
		last, seen[c.ID] = c.At, true
	}
	once := sequence(trace, pace{Divisor: 8, Speed: 1}, false)
	for range 2 {
		if _, ok := once(); !ok {
			t.Fatal("ended early")
		}
	}
	if _, ok := once(); ok {
		t.Error("the trace is sent once only")
	}
}

func TestVLLMLedger(t *testing.T) {
	var l ledger
	for line := range strings.Lines(`# HELP vllm:kv_cache_usage_perc x
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.0
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.02
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"} 200.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"} 31.0
vllm:nixl_xfer_time_seconds_count{engine="0",model_name="tiny"} 3.0
vllm:nixl_xfer_time_seconds_created{engine="0",model_name="tiny"} 1.7953145016352086e+09
vllm:nixl_num_kv_expired_reqs_total{engine="0",model_name="tiny"} 1.0
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 64.0
`) {
		l.add(strings.TrimSpace(line))
	}
	if want := (ledger{Pulls: 3, PulledTokens: 200, CachedTokens: 64, Held: 1, Leaked: 1}); l != want {
		t.Errorf("ledger %+v, want %+v", l, want)
	}
}
