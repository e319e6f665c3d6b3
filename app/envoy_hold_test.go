// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/simulate"
)

func skipHeaders(text string) string {
	return strings.Replace(text, headerSend, "response_header_mode: SKIP", 1)
}

func timeout(d time.Duration) func(*envoy.Values) {
	return func(v *envoy.Values) { v.MessageTimeout = d }
}

// TestEnvoyPrefillOutlastsMessageTimeout: no timer of the gateway ends a request that is held for its prefill.
func TestEnvoyPrefillOutlastsMessageTimeout(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, envoy string
		values      func(*envoy.Values)
		rewrite     func(string) string
		prefill     time.Duration
	}{
		// Without response headers, whose answer is timed: how fast this machine is must not matter.
		{name: "full duplex, 200 ms", envoy: envoy.QuietOverrideHost, values: timeout(200 * time.Millisecond), rewrite: skipHeaders, prefill: 1500 * time.Millisecond},
		{name: "full duplex both ways, 200 ms", envoy: envoy.FullDuplexOverrideHost, values: timeout(200 * time.Millisecond), prefill: 1500 * time.Millisecond},
		{name: "buffered, 1 s", envoy: envoy.BufferedOverrideHost, values: timeout(time.Second), prefill: 3 * time.Second},
		{name: "full duplex, 200 ms, real time", envoy: envoy.QuietOverrideHost, values: timeout(200 * time.Millisecond), rewrite: skipHeaders, prefill: 10 * time.Second},
		{name: "buffered as shipped, real time", envoy: envoy.BufferedOverrideHost, prefill: 10 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			inReal := test.prefill >= 10*time.Second
			if inReal && testing.Short() {
				t.Skip("ten seconds of real time, and -short is set")
			}
			t.Parallel()
			s := newStack(t, stackOptions{envoy: test.envoy, values: test.values, rewrite: test.rewrite})
			s.setFaults("prefill", simulate.Fault{Kind: "delay", Phase: "prefill", DelayMS: int(test.prefill.Milliseconds())})
			for _, stream := range []string{"", `,"stream":true`} {
				if stream != "" && inReal {
					break
				}
				id := "r" + strconv.Itoa(len(stream))
				r := s.post("/v1/chat/completions", chatBody(100, stream), "x-request-id", id)
				if test.rewrite == nil {
					r.whole(t, "disaggregated")
				} else if r.whole(t, ""); s.decision(id).Outcome != "disaggregated" {
					t.Errorf("decision %+v", s.decision(id))
				}
				if r.elapsed < test.prefill {
					t.Errorf("answered after %v, before the prefill was over", r.elapsed)
				}
			}
			s.settled()
		})
	}
}

// TestEnvoyHolds1500 holds 1,500 requests at once, counts their bytes, and answers them all.
func TestEnvoyHolds1500(t *testing.T) {
	const count = 1500
	o := single(1, 1)
	o.Template.NumBlocks, o.Template.InterToken = 1<<16, 500*time.Microsecond
	o.Template.RecordBodies = 1
	s := newStack(t, stackOptions{
		pool: o, values: timeout(time.Minute),
		// Limits that a slow machine does not meet.
		config: "disaggregation: {budget: 10m, prefill: {timeout: 10m, maxConcurrentPerEndpoint: 2000, connectTimeout: 30s}}\n",
	})
	before := heap()
	prefill := s.engines("prefill")[0]
	release := s.occupy(prefill)
	body := strings.Replace(chatBody(1000, ""), `"max_tokens":4`, `"max_tokens":1`, 1)
	answers := make(chan result, count)
	for range count {
		go func() {
			r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", strings.NewReader(body))
			answers <- result{r, err}
		}()
	}
	eventually(t, "all are held", func() bool {
		if len(answers) > 0 {
			r := <-answers
			t.Fatalf("answered instead of held: %v, %d %v: %s", r.err, r.status, r.header, r.body)
		}
		return s.app.server.Streams() == count && prefill.Stats().Waiting == count
	})
	if held := s.sum("baton_admission_held_bytes"); held != float64(count*len(body)) {
		t.Errorf("%v bytes held, want %d", held, count*len(body))
	}
	if n := s.load("decode"); n < count {
		t.Errorf("load of decode is %d", n)
	}
	release()
	for range count {
		r := <-answers
		if r.err != nil {
			t.Fatal(r.err)
		}
		r.whole(t, "disaggregated")
	}
	s.settled()
	s.client.CloseIdleConnections()
	eventually(t, "the heap is what it was", func() bool { return heap() < before+(64<<20) })
}

// heap is the bytes in use after a collection.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}

// TestEnvoyIdleConnections: 500 clients send two requests 4.5 to 5.5 s apart to servers that close idle connections
// after 5 s. Nobody may meet a connection that is just being closed: not Envoy, and not Baton's own prefills.
func TestEnvoyIdleConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("five seconds of real time, and -short is set")
	}
	const clients = 500
	o := fast(2, 2)
	o.Template.RecordBodies = 1
	s := newStack(t, stackOptions{pool: o})
	var wg sync.WaitGroup
	failed := make(chan error, 2*clients)
	for i := range clients {
		wg.Go(func() {
			transport := &http.Transport{}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: 2 * time.Minute}
			body := fmt.Sprintf(`{"model":"tiny","max_tokens":2,"messages":[{"role":"user","content":"%d %s"}]}`, i, strings.Repeat("word ", 40))
			for turn := range 2 {
				if turn > 0 {
					// The gap is the subject of the test: spread over the moment at which servers close.
					time.Sleep(4500*time.Millisecond + time.Duration(i)*time.Second/clients)
				}
				if err := s.once(t.Context(), client, body); err != nil {
					failed <- fmt.Errorf("client %d, turn %d: %w", i, turn, err)
				}
			}
		})
	}
	wg.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	s.settled()
}

// once sends a chat request that must be answered, and disaggregated.
func (s *stack) once(ctx context.Context, client *http.Client, body string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.envoy.URL+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if outcome := resp.Header.Get("x-baton-outcome"); err != nil || resp.StatusCode != http.StatusOK || outcome != "disaggregated" {
		return errors.Join(err, fmt.Errorf("status %d, outcome %q: %.200s", resp.StatusCode, outcome, text))
	}
	return nil
}
