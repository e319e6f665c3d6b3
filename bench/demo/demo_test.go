// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// fakePicker is Envoy, Baton and the model servers in one: it answers chats and tells decisions about them.
type fakePicker struct {
	server *httptest.Server
	asked  atomic.Int64

	mu        sync.Mutex
	followers []chan decision
}

func newFakePicker(t *testing.T) *fakePicker {
	t.Helper()
	f := &fakePicker{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/chat/completions", f.chat)
	mux.HandleFunc("GET /debug/decisions", f.decisions)
	mux.HandleFunc("GET /debug/endpoints", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `[{"endpoint":"default/decode-0","role":"decode","ready":true,"fresh":true,"kv_cache_usage":0.5,"standing":"healthy"},
			{"endpoint":"default/prefill-0","role":"prefill","ready":true,"fresh":true,"queue":2,"standing":"ejected"}]`)
	})
	f.server = httptest.NewServer(mux)
	t.Cleanup(f.server.CloseClientConnections)
	t.Cleanup(f.server.Close)
	return f
}

func (f *fakePicker) chat(w http.ResponseWriter, r *http.Request) {
	f.asked.Add(1)
	var body chatBody
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || !body.Stream || len(body.Messages) != 2 {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	id := r.Header.Get("X-Request-Id")
	w.Header().Set("X-Baton-Outcome", outcomeDisaggregated)
	fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n")
	for range 3 {
		fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\" word\"}}]}\n\n")
	}
	fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n")
	fmt.Fprint(w, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":77,\"completion_tokens\":3}}\n\n: beat\n\ndata: [DONE]\n\n")
	f.tell(testDecision(id, 2))
}

func testDecision(id string, matched int) decision {
	var d decision
	text := fmt.Sprintf(`{"request_id":%q,"prompt_tokens":1077,"prompt_blocks":17,"outcome":"disaggregated",
		"picks":{"decode":"default/decode-0","prefill":"default/prefill-1"},"reasons":{"prefill":"uncached prompt"},
		"profiles":[{"phase":"prefill","endpoints":[{"endpoint":"default/prefill-0","matched_blocks":%d},{"endpoint":"default/prefill-1"}]}],
		"attempts":[{"phase":"prefill","endpoint":"default/prefill-1","status":503},{"phase":"prefill","endpoint":"default/prefill-0","status":200}]}`, id, matched)
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		panic(err)
	}
	return d
}

func (f *fakePicker) tell(d decision) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, to := range f.followers {
		to <- d
	}
}

func (f *fakePicker) decisions(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Accept") != "text/event-stream" {
		http.Error(w, "not a follower", http.StatusNotAcceptable)
		return
	}
	ch := make(chan decision, 1000)
	f.mu.Lock()
	f.followers = append(f.followers, ch)
	f.mu.Unlock()
	control := http.NewResponseController(w)
	for control.Flush() == nil {
		select {
		case d := <-ch:
			text, err := json.Marshal(d)
			if err != nil {
				return
			}
			fmt.Fprintf(w, "data: %s\n\n", text)
		case <-r.Context().Done():
			return
		}
	}
}

// TestStream sends some of the sample and checks what was seen of it.
func TestStream(t *testing.T) {
	f := newFakePicker(t)
	trace, err := readTrace("../testdata/mooncake-sample.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	seen := newTally()
	ctx, cancel := context.WithCancel(t.Context())
	h := newHTTPClient()
	t.Cleanup(h.CloseIdleConnections)
	w := watcher{http: h, base: f.server.URL}
	var all sync.WaitGroup
	all.Go(func() { w.decisions(ctx, seen.decide) })
	all.Go(func() { w.endpoints(ctx, seen.pool) })
	until(t, func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.followers) > 0 })

	c := &client{http: h, base: f.server.URL, model: "demo"}
	replay(ctx, ctx, c, sequence(trace[:40], pace{Divisor: 8, Speed: 100}, false), seen.sent, seen.done)
	until(t, func() bool { s := seen.snapshot(); return s.Totals.Decisions == 40 && len(s.Endpoints) == 2 })
	var lines strings.Builder
	ended, end := context.WithCancel(ctx)
	end()
	showLines(ended, &lines, seen)
	cancel()
	all.Wait()

	s := seen.snapshot()
	if got, want := s.Totals, (totals{Sent: 40, Answered: 40, Disaggregated: 40, Decisions: 40, PrefixHits: 40, MatchedBlocks: 80, PromptBlocks: 680}); got != want {
		t.Errorf("totals %+v, want %+v", got, want)
	}
	if s.Median <= 0 || s.P95 < s.Median {
		t.Errorf("first token: median %v, p95 %v", s.Median, s.P95)
	}
	if got := s.Hits["default/prefill-0"]; got != (hits{Picked: 40, Hit: 40}) {
		t.Errorf("hits of the server that prefilled: %+v", got)
	}
	if s.Endpoints[0].Role != phasePrefill {
		t.Errorf("prefill servers must come first: %+v", s.Endpoints)
	}
	if n := strings.Count(lines.String(), "prefill-0 -> decode-0"); n != 40 {
		t.Errorf("%d lines name both servers, want 40:\n%s", n, lines.String())
	}
}

func until(t *testing.T, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		wait(t.Context(), 10*time.Millisecond)
	}
	t.Fatal("it did not happen within 60 s")
}

// TestStreamFailures checks that an answer that is not whole is a failure.
func TestStreamFailures(t *testing.T) {
	f := func(name, body string, status int, want string) {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(status)
				fmt.Fprint(w, body)
			}))
			defer s.Close()
			c := &client{http: newHTTPClient(), base: s.URL}
			defer c.http.CloseIdleConnections()
			got := c.stream(t.Context(), chat{ID: "x"})
			if got.Err == nil || !strings.Contains(got.Err.Error(), want) {
				t.Errorf("error %v, want one that says %q", got.Err, want)
			}
		})
	}
	const token = "data: {\"choices\":[{\"delta\":{\"content\":\" word\"}}]}\n\n"
	f("refused", `{"error":{"message":"no endpoint"}}`, 503, "status 503: {")
	f("cut off", token, 200, errCutOff.Error())
	f("empty", "data: [DONE]\n\n", 200, errNoToken.Error())
	f("no finish", token+"data: [DONE]\n\n", 200, "finish reason")
	f("error event", token+"data: {\"error\":{\"message\":\"engine died\"}}\n\n", 200, "engine died")
}

func TestPortsFree(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).Port
	err = portsFree(t.Context(), options{PortBase: taken}, 0)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("port %d is taken", taken)) || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %v, want one sentence with the port", err)
	}
}

func TestOptions(t *testing.T) {
	t.Chdir(t.TempDir())
	f := func(name, value, want string) {
		t.Helper()
		_, err := parseOptions([]string{"-envoy", "envoy"}, func(n string) string {
			if n == name {
				return value
			}
			return ""
		})
		if got := fmt.Sprint(err); got != want {
			t.Errorf("%s=%s: error %q, want %q", name, value, got, want)
		}
	}
	f("DEMO_PORT_BASE", "19000", "<nil>")
	f("DEMO_SECONDS", "0.5", "<nil>")
	f("DEMO_PORT_BASE", "80", "DEMO_PORT_BASE=80: must be a number from 1024 to 65235")
	f("DEMO_SECONDS", "soon", "DEMO_SECONDS=soon: must be a number of seconds above 0")
}

// TestSupervisor checks that a process is ended with what it started, and that one that ends by itself is noticed.
func TestSupervisor(t *testing.T) {
	s := newSupervisor(t.TempDir())
	script := "sleep 1000 & echo $!; trap '' TERM; wait; wait" // it ignores the polite signal, and has a child
	if err := s.start(t.Context(), command{Name: "stubborn", Path: "/bin/sh", Args: []string{"-c", script}}); err != nil {
		t.Fatal(err)
	}
	p := s.procs[0]
	until(t, func() bool { text, err := os.ReadFile(p.log); return err == nil && len(text) > 0 })
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	if left := s.stop(impatient); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := syscall.Kill(-p.pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the group is there: %v", err)
	}

	if err := s.start(t.Context(), command{Name: "brief", Path: "/bin/sh", Args: []string{"-c", "echo bad flag; exit 3"}}); err != nil {
		t.Fatal(err)
	}
	err := s.until(t.Context(), "the start of brief", 5*time.Second, func(context.Context) error { return errors.New("not yet") })
	if err == nil || !strings.Contains(err.Error(), "brief ended by itself") || !strings.Contains(err.Error(), "bad flag") {
		t.Errorf("error %v, want one that says how brief ended", err)
	}
	s.stop(t.Context())
}

// TestSurvivors kills the demo the hard way: nothing it started may go on.
func TestSurvivors(t *testing.T) {
	if os.Getenv("DEMO_TEST_PARENT") != "" {
		s := newSupervisor(os.Getenv("DEMO_TEST_PARENT"))
		if err := s.start(t.Context(), command{Name: "child", Path: "/bin/sleep", Args: []string{"1000"}}); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("child %d\n", s.procs[0].pid)
		select {}
	}
	if _, err := os.Stat("/proc/self"); err != nil {
		t.Skip("only Linux ends the processes of a parent that was killed")
	}
	bounded, cancel := context.WithTimeout(t.Context(), time.Minute) // a parent that never speaks is ended, too
	defer cancel()
	parent := exec.CommandContext(bounded, os.Args[0], "-test.run", "^TestSurvivors$")
	parent.Env = append(os.Environ(), "DEMO_TEST_PARENT="+t.TempDir())
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err := fmt.Fscanf(out, "child %d\n", &child); err != nil {
		t.Fatal(err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := parent.Wait(); err == nil {
		t.Error("the parent was not killed")
	}
	until(t, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
}

func TestEnginesFile(t *testing.T) {
	dir := t.TempDir()
	want := []engine{{Name: "prefill-0", Role: phasePrefill}, {Name: "decode-0", Role: phaseDecode}}
	for i := range want {
		want[i].Addr = l4(8000 + i)
	}
	if err := writeEngines(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := readEngines(dir)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("read %v, %v; want %v", got, err, want)
	}
	if err := os.WriteFile(filepath.Join(dir, endpointsFile), []byte("endpoints: []"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readEngines(dir); err == nil {
		t.Error("an empty list is accepted")
	}
}
