// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// TestBudget is a 504 when the budget ends, whatever the phase's own timeout is (S0-2, clause g).
func TestBudget(t *testing.T) {
	const budget = 120 * time.Second
	f := func(name string, phase time.Duration, onFailure string, late time.Duration, attempts int) {
		t.Helper()
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, func(c *config.Disaggregation) {
				c.Budget, c.Prefill.Timeout, c.OnFailure, c.Prefill.Attempts = budget, phase, onFailure, 5
			})
			var working atomic.Int32
			stuck := func(w http.ResponseWriter, req *http.Request) {
				working.Add(1)
				hang(w, req)
				working.Add(-1)
			}
			net := r.bubble()
			j := r.job(inference.Completions, clientBody, nil, net.server("a", stuck), net.server("b", stuck), net.server("c", stuck))
			start := time.Now()
			j.Start = start.Add(-late)
			_, err := r.Run(t.Context(), j)
			if took := time.Since(start); !errors.Is(err, ErrBudgetSpent) || took != budget-late {
				t.Errorf("%s: %v after %v", name, err, took)
			}
			r.idle()
			r.want(float64(attempts), "attempts_total")
			r.want(1, "attempts_total", "budget")
			if synctest.Wait(); working.Load() != 0 {
				t.Errorf("%s: %d handlers did not see the end", name, working.Load())
			}
		})
	}
	f("one long attempt", time.Hour, "aggregate", 0, 1)
	f("the second attempt gets what is left", 80*time.Second, "aggregate", 0, 2)
	f("fail", time.Hour, "fail", 0, 1)
	f("half spent before", 25*time.Second, "aggregate", budget/2, 3)
	f("spent before", time.Hour, "aggregate", budget, 1)
}

// TestClientLeaves cancels the sub-request at once: the engine sees the abort and frees its blocks (S0-3, C5).
func TestClientLeaves(t *testing.T) {
	r, peers := newRig(t, nil), simulate.NewRegistry()
	p, pe := r.engine("p", "prefill", peers, func(o *simulate.Options) { o.PrefillFixed = 10 * time.Minute })
	_, other := r.engine("p2", "prefill", peers, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for len(p.Held()) == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	j := r.job(inference.Completions, clientBody, nil, pe, other)
	_, err := r.Run(ctx, j)
	if !errors.Is(err, context.Canceled) || !strings.HasPrefix(err.Error(), "prefill "+pe.Hostport+" attempt 1: ") {
		t.Fatalf("error %v", err)
	}
	r.idle()
	eventually(t, "abort", func() bool { return len(p.Aborts()) == 1 && len(p.Held()) == 0 })
	r.want(1, "attempts_total", "canceled")
	r.want(0, "retries_total")
	r.want(0, "fallbacks_total")
	r.want(0, "leaked_prefill_total")
	if s := pe.Health.Standing(time.Now()); s != pool.Healthy {
		t.Errorf("the endpoint was blamed: %v", s)
	}
}

// TestAttemptOverBeforeNext: the old attempt's connection is closed before the next attempt starts (section 5,
// duplicates).
func TestAttemptOverBeforeNext(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) { c.Prefill.Timeout = time.Second })
	ended := make(chan struct{})
	a := r.server("a", func(w http.ResponseWriter, req *http.Request) { hang(w, req); close(ended) })
	b := r.server("b", func(w http.ResponseWriter, req *http.Request) {
		select {
		case <-ended:
		case <-req.Context().Done():
			t.Error("the first attempt still runs")
		}
		answer(goodAnswer)(w, req)
	})
	if out := r.run(r.job(inference.Completions, clientBody, nil, a, b)); out.Prefiller != b {
		t.Errorf("%s", reasons(out))
	}
}

// TestSlots bounds what an endpoint gets at once; the wait counts against the attempt's time (section 3).
func TestSlots(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) { c.Prefill.MaxConcurrentPerEndpoint = 2 })
	var now, most atomic.Int32
	released, release := gate()
	p := r.server("p", func(w http.ResponseWriter, req *http.Request) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-released
		now.Add(-1)
		answer(goodAnswer)(w, req)
	})
	t.Cleanup(release)
	var wg sync.WaitGroup
	for range 6 {
		j := r.job(inference.Completions, clientBody, nil, p)
		wg.Go(func() {
			if out, err := r.Run(t.Context(), j); err != nil || !out.HasHandle {
				t.Errorf("%+v, %v", out, err)
			}
		})
	}
	eventually(t, "six wanted", func() bool { return r.metric("in_flight") == 6 && now.Load() == 2 })
	release()
	wg.Wait()
	if most.Load() > 2 {
		t.Errorf("%d at once", most.Load())
	}
	r.want(4, "slot_wait_seconds")
	r.idle()

	r = newRig(t, func(c *config.Disaggregation) {
		c.Prefill.MaxConcurrentPerEndpoint, c.Prefill.Timeout = 1, 20*time.Millisecond
	})
	p = r.server("p", func(http.ResponseWriter, *http.Request) { t.Error("two at once") })
	slots, err := r.peers.slot(t.Context(), p, 1)
	if err != nil {
		t.Fatal(err)
	}
	if out := r.run(r.job(inference.Completions, clientBody, nil, p)); reasons(out) != "saturated" {
		t.Errorf("%s", reasons(out))
	}
	if r.peers.byKey[keyOf(p)].Counts().TotalFailures != 0 {
		t.Error("the endpoint was blamed for our own limit")
	}
	<-slots
}

// TestRetryBudget caps retries pool-wide under a full outage (clause g).
func TestRetryBudget(t *testing.T) {
	const requests = 200
	r := newRig(t, func(c *config.Disaggregation) {
		c.Prefill.Attempts, c.Breaker.Failures = 3, 1<<30
		c.RetryBudget = config.RetryBudget{Ratio: 0.1, MinPerSecond: 1}
	})
	a, b, c := r.refusing("a"), r.refusing("b"), r.refusing("c")
	start := time.Now()
	for range requests {
		for _, e := range r.all {
			e.Health.Succeed()
		}
		if out := r.run(r.job(inference.Completions, clientBody, nil, a, b, c)); out.Name != "fallback-refused" {
			t.Fatalf("%s", out.Name)
		}
	}
	limit := 0.1*requests + 1*retryWindow.Seconds() + time.Since(start).Seconds() + 1
	retries := r.metric("retries_total")
	if retries > limit || retries < 0.1*requests {
		t.Errorf("%v retries of %v allowed", retries, limit)
	}
	r.want(requests+retries, "attempts_total")
	if r.metric("retries_refused_total") == 0 {
		t.Error("no retry refused")
	}
}

func TestRetryBucket(t *testing.T) {
	now := time.Unix(0, 0)
	b := newRetryBudget(config.RetryBudget{Ratio: 0.2, MinPerSecond: 3}, now)
	spend := func(want int) {
		t.Helper()
		n := 0
		for b.take(now) {
			n++
		}
		if n != want {
			t.Errorf("%d retries, want %d", n, want)
		}
	}
	spend(30) // ten seconds of the minimum
	now = now.Add(2 * time.Second)
	spend(6)
	now = now.Add(time.Hour)
	spend(30)
	for range 100 {
		b.earn()
	}
	spend(20)
	for range 10000 {
		b.earn()
	}
	spend(retrySavings)
	b.set(config.RetryBudget{})
	now = now.Add(time.Hour)
	b.earn()
	spend(0)
}

// TestBreaker runs a breaker through its states.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opened := 0
		b := newBreaker(config.Breaker{Failures: 3, OpenFor: 10 * time.Second}, func() { opened++ })
		allowed := func(want bool) {
			t.Helper()
			if got := b.allow(time.Now()); got != want {
				t.Errorf("allowed %v in state %v", got, b.State())
			}
		}
		b.note(false)
		b.note(false)
		b.note(true)
		b.note(false)
		b.note(false)
		allowed(true) // not in a row
		b.note(false)
		allowed(false)
		b.note(true) // of an attempt that began before
		allowed(false)
		time.Sleep(10*time.Second + 1)
		allowed(true)  // the probe
		allowed(false) // one only
		b.note(false)
		allowed(false)
		time.Sleep(10*time.Second + 1)
		allowed(true)
		time.Sleep(10 * time.Second)
		allowed(true) // a probe that never came back does not lock it for ever
		b.note(true)
		if allowed(true); b.State() != gobreaker.StateClosed || opened != 1 {
			t.Errorf("state %v, opened %d times", b.State(), opened)
		}
	})
}

// TestBreakerOfEndpoint opens after failures in a row, and starts clean for another pod at the address.
func TestBreakerOfEndpoint(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) { c.Breaker = config.Breaker{Failures: 2, OpenFor: time.Minute} })
	calls := 0
	p := r.server("p", func(w http.ResponseWriter, req *http.Request) { calls++; status(500)(w, req) })
	for range 4 {
		r.run(r.job(inference.Completions, clientBody, nil, p))
	}
	if calls != 2 {
		t.Errorf("%d calls to an endpoint that fails", calls)
	}
	r.want(2, "fallbacks_total", "no_prefiller")
	r.want(1, "breakers", "endpoint", "open")

	reborn := *p
	reborn.UID = "reborn"
	r.drop(p)
	r.all = append(r.all, &reborn)
	r.publish()
	r.run(r.job(inference.Completions, clientBody, nil, &reborn))
	if calls != 3 {
		t.Errorf("the new pod was not asked: %d calls", calls)
	}
	r.want(0, "breakers", "endpoint", "open")
	if n := len(r.peers.byKey); n != 1 {
		t.Errorf("%d endpoints remembered", n)
	}
}

// TestBreakerOfPair keeps apart two endpoints that cannot transfer to each other, and nothing else (C10).
func TestBreakerOfPair(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) { c.Breaker = config.Breaker{Failures: 2, OpenFor: time.Minute} })
	p1, p2 := r.server("p1", answer(goodAnswer)), r.server("p2", answer(goodAnswer))
	d1, d2 := r.add("d1", "decode", "10.9.9.1:8000"), r.add("d2", "decode", "10.9.9.2:8000")
	serve := func(d *pool.Endpoint, ok bool) *pool.Endpoint {
		out := r.run(r.job(inference.Completions, clientBody, d, p1, p2))
		_ = r.Forward(t.Context(), r.job(inference.Completions, clientBody, d), out, d)
		r.Transferred(t.Context(), out, d, ok)
		return out.Prefiller
	}
	for range 2 {
		if serve(d1, false) != p1 {
			t.Fatal("wrong prefiller")
		}
	}
	if serve(d1, true) != p2 || serve(d2, true) != p1 {
		t.Error("the pair, and only it, was to be avoided")
	}
	r.want(1, "breakers", "pair", "open")
	r.want(2, "transfers_failed_total")
	r.drop(d1)
	if serve(d2, true) != p1 || len(r.peers.pairs) != 0 {
		t.Errorf("%d pairs remembered", len(r.peers.pairs))
	}
}

// TestSubRequestsDoNotBlockEachOther: many prefills at once, each at its own pace (S0-1).
func TestSubRequestsDoNotBlockEachOther(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) { c.Prefill.MaxConcurrentPerEndpoint = 1000 })
	released, release := gate()
	stuck := r.server("stuck", func(w http.ResponseWriter, req *http.Request) { <-released; answer(goodAnswer)(w, req) })
	quick := r.server("quick", answer(goodAnswer))
	t.Cleanup(release)
	var wg sync.WaitGroup
	for range 100 {
		j := r.job(inference.Completions, clientBody, nil, stuck)
		wg.Go(func() {
			if out, err := r.Run(t.Context(), j); err != nil || !out.HasHandle {
				t.Errorf("%v %v", out, err)
			}
		})
	}
	eventually(t, "100 in flight", func() bool { return r.metric("in_flight") == 100 })
	if out, err := r.Run(t.Context(), r.job(inference.Completions, clientBody, nil, quick)); err != nil || !out.HasHandle {
		t.Errorf("%v %v", out, err)
	}
	release()
	wg.Wait()
	r.idle()
}

// TestMemory holds one copy of each body however many are held, and nothing afterwards (S0-4, section 4).
func TestMemory(t *testing.T) {
	const n, size = 16, 1 << 19
	r := newRig(t, func(c *config.Disaggregation) { c.Prefill.MaxConcurrentPerEndpoint = n })
	released, release := gate()
	p := r.server("p", func(w http.ResponseWriter, req *http.Request) {
		buf := make([]byte, 4096)
		for {
			if _, err := req.Body.Read(buf); err != nil {
				break
			}
		}
		<-released
		answer(goodAnswer)(w, req)
	})
	t.Cleanup(release)
	jobs := make([]*Job, n)
	for i := range jobs {
		jobs[i] = r.job(inference.Completions, `{"prompt":"`+strings.Repeat("x", size)+`"}`, nil, p)
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	var wg sync.WaitGroup
	for _, j := range jobs {
		wg.Go(func() {
			if out, err := r.Run(t.Context(), j); err != nil || !out.HasHandle {
				t.Errorf("%v %v", out, err)
			}
		})
	}
	eventually(t, "all in flight", func() bool { return r.metric("sent_bytes_total") > n*size && r.metric("in_flight") == n })
	var grown int64
	eventually(t, "next to nothing more for each held body", func() bool {
		grown = heap() - before
		return grown <= n*size/4
	})
	t.Logf("%d KiB more for each held body", grown/n/1024)
	release()
	wg.Wait()
	r.idle()
}

// gate returns a channel that is closed by the first call of release, which is put among the clean-ups last so that no
// server waits for its handlers for ever.
func gate() (released chan struct{}, release func()) {
	released = make(chan struct{})
	return released, sync.OnceFunc(func() { close(released) })
}
