// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/scheduler"
)

// TestAllocations: the ceilings of a decision, metrics on.
func TestAllocations(t *testing.T) {
	f := func(name, text string, change func(*scheduler.Query), ceiling float64) {
		t.Helper()
		s := load(t, text)
		q := query(pooltest.Idle(100), strings.Repeat("a prompt of four kilobytes ", 150))
		if change != nil {
			change(q)
		}
		alloctest.AtMost(t, ceiling, name, func() {
			d, err := s.Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			d.Learn(d.Phase(scheduler.PhaseDecode).Ranked[0].Endpoint, nil)
			for ph := range d.Picks {
				d.Picks[ph].Reservation.Release()
			}
			d.Release()
		})
	}
	f("default", "", nil, 0)
	f("four scorers", fourScorers, nil, 0)
	f("four scorers, ranked", fourScorers, func(q *scheduler.Query) { q.Rank = 3 }, 0)
	f("reserved: the reservation itself", fourScorers, func(q *scheduler.Query) { q.Reserve = true }, 1)
	f("P/D, reserved", pdSample, func(q *scheduler.Query) { q.Snapshot, q.Reserve = pdPool(), true }, 2)
}

// TestRepeatable: the same query gives the same answer, another seed another one among equals.
func TestRepeatable(t *testing.T) {
	for _, picker := range []string{"max-score-picker", "random-picker", "weighted-random-picker"} {
		s := load(t, "plugins: [{type: queue-scorer}, {type: "+picker+"}]")
		q := query(pooltest.Idle(50), "x")
		q.Rank = 5
		rank := func(seed uint64) string {
			q.Seed = seed
			d, err := s.Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Release()
			return names(d.Phase(scheduler.PhaseDecode))
		}
		if a, b := rank(7), rank(7); a != b {
			t.Errorf("%s: %s, then %s", picker, a, b)
		}
		different := map[string]bool{}
		for seed := range uint64(10) { // 0 is a seed of the scheduler's own
			different[rank(seed)] = true
		}
		if len(different) < 9 {
			t.Errorf("%s: ten seeds gave %d rankings", picker, len(different))
		}
	}
}

// broken is a scorer that returns what it must not.
type broken struct{}

func (broken) Score(_ *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	for i := range cands {
		out[i] = []float64{math.NaN(), 7, -1, math.Inf(1), 0.5}[i%5]
	}
}

// TestBadScores: a score that is no number from 0 to 1 counts as 0, and is counted.
func TestBadScores(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := load(t, one, func(o *scheduler.Options) {
		o.Metrics = reg
		o.Config.Plugins[0].Type = "broken"
		o.Plugins = append(o.Plugins, scheduler.Registry{
			"broken": func(*scheduler.Builder, config.Parameters) (any, error) { return broken{}, nil },
		})
	})
	q := query(pooltest.Idle(5), "x")
	q.Rank = 5
	d, err := s.Schedule(q)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Release()
	for i, r := range d.Phase(scheduler.PhaseDecode).Ranked {
		if want := map[bool]float64{true: 0.5}[i == 0]; r.Score != want {
			t.Errorf("rank %d: score %v, want %v", i+1, r.Score, want)
		}
	}
	const want = `
# HELP baton_scheduler_bad_scores_total Scores that were not a number from 0 to 1 and counted as 0.
# TYPE baton_scheduler_bad_scores_total counter
baton_scheduler_bad_scores_total{plugin_name="queue-scorer",plugin_type="broken"} 4
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "baton_scheduler_bad_scores_total"); err != nil {
		t.Error(err)
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := load(t, pdSample, func(o *scheduler.Options) { o.Metrics = reg })
	q := query(pdPool(), strings.Repeat("a", long))
	for range 3 {
		d, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		d.Release()
	}
	q.OnlyDecode = true
	if d, err := s.Schedule(q); err == nil {
		d.Release()
	}
	q.Snapshot = pooltest.Snapshot()
	if _, err := s.Schedule(q); err == nil {
		t.Error("scheduled on an empty pool")
	}
	const want = `
# HELP llm_d_epp_disagg_decision_total Decisions by the phases that run.
# TYPE llm_d_epp_disagg_decision_total counter
llm_d_epp_disagg_decision_total{decision_type="decode-only",plugin_name="disagg-profile-handler",plugin_type="disagg-profile-handler"} 1
llm_d_epp_disagg_decision_total{decision_type="encode-decode",plugin_name="disagg-profile-handler",plugin_type="disagg-profile-handler"} 0
llm_d_epp_disagg_decision_total{decision_type="encode-prefill-decode",plugin_name="disagg-profile-handler",plugin_type="disagg-profile-handler"} 0
llm_d_epp_disagg_decision_total{decision_type="prefill-decode",plugin_name="disagg-profile-handler",plugin_type="disagg-profile-handler"} 3
# HELP llm_d_epp_scheduler_attempts_total Scheduling cycles by result.
# TYPE llm_d_epp_scheduler_attempts_total counter
llm_d_epp_scheduler_attempts_total{status="failure"} 1
llm_d_epp_scheduler_attempts_total{status="success"} 4
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "llm_d_epp_disagg_decision_total", "llm_d_epp_scheduler_attempts_total"); err != nil {
		t.Error(err)
	}
	for name, names := range map[string]string{"inference_extension_scheduler_e2e_duration_seconds": "gie", "llm_d_epp_scheduler_e2e_duration_seconds": "llm-d"} {
		reg := prometheus.NewRegistry()
		load(t, "", func(o *scheduler.Options) { o.Metrics, o.MetricNames = reg, names })
		if n, err := testutil.GatherAndCount(reg, name); n != 1 || err != nil {
			t.Errorf("%s: %d series, %v", name, n, err)
		}
	}
}

// TestConcurrentUse is for the race detector: decisions, lessons, departures, health and a reload at once.
func TestConcurrentUse(t *testing.T) {
	s := load(t, pdSample, func(o *scheduler.Options) { o.Trace = true })
	snap := pdPool()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 200 {
				q := query(snap, strings.Repeat("a", 256*(i%20)))
				q.Reserve, q.Rank = true, 2
				d, err := s.Schedule(q)
				if err != nil {
					t.Error(err)
					return
				}
				pick := d.Phase(scheduler.PhaseDecode)
				e, r := pick.Ranked[0].Endpoint, pick.Reservation
				d.Learn(e, nil)
				d.Phase(scheduler.PhasePrefill).Reservation.Release()
				d.Release()
				r.Release()
				if i%50 == 0 {
					e.Health.Fail(time.Now())
					s.Forget(e.Slot)
				}
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			load(t, pdSample, func(o *scheduler.Options) { o.Previous = s })
		}
	})
	wg.Wait()
	for _, e := range snap.Endpoints {
		if e.Load.Requests() != 0 || e.Load.Tokens() != 0 {
			t.Errorf("%s: %d requests, %d tokens left", e.Name, e.Load.Requests(), e.Load.Tokens())
		}
	}
}
