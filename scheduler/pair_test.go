// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

const (
	decodeFirst  = `{type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}`
	prefillFirst = `{type: disagg-profile-handler, parameters: {stageOrder: prefill-first}}`
)

// TestPairFilter: endpoints that cannot hand KV blocks over to each other are never picked for the same request.
func TestPairFilter(t *testing.T) {
	const tp = pool.LabelTensorParallel
	type pick struct{ prefill, decode, reason string }
	f := func(name, handler string, want pick, endpoints ...*pooltest.Builder) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			q := query(pooltest.Snapshot(endpoints...), "x")
			q.Rank = 5
			d, err := load(t, twoProfiles(handler)).Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Release()
			p := d.Phase(scheduler.PhasePrefill)
			if got := (pick{names(p), names(d.Phase(scheduler.PhaseDecode)), p.Reason}); got != want {
				t.Errorf("%+v, want %+v", got, want)
			}
			if p.Wanted == p.Run {
				t.Errorf("run %v, wanted %v", p.Run, p.Wanted)
			}
		})
	}
	prefill := func(name string, waiting float64) *pooltest.Builder {
		return pooltest.E(name).Role("prefill").Waiting(waiting)
	}
	decode := func(name string, waiting float64) *pooltest.Builder {
		return pooltest.E(name).Role("decode").Waiting(waiting)
	}
	f("a larger prefill is cut", decodeFirst, pick{"p2 p1 p0", "d", "always"},
		prefill("p8", 0).Label(tp, "8"), prefill("p2", 1).Label(tp, "2"), prefill("p1", 2).Label(tp, "1"), prefill("p0", 3), decode("d", 0).Label(tp, "2"))
	f("a smaller decode is cut", prefillFirst, pick{"p4", "d8 d4 d0", "prefill-first"},
		prefill("p4", 0).Label(tp, "4"), decode("d2", 0).Label(tp, "2"), decode("d8", 1).Label(tp, "8"), decode("d4", 2).Label(tp, "4"), decode("d0", 3))
	f("a decode that does not tell", decodeFirst, pick{"p8", "d", "always"}, prefill("p8", 0).Label(tp, "8"), decode("d", 0))
	f("a value that is no size", decodeFirst, pick{"p8", "d", "always"}, prefill("p8", 0).Label(tp, "8"), decode("d", 0).Label(tp, "two"))
	f("only larger prefills", decodeFirst, pick{"", "d", "prefill's tensor parallel size is larger than decode's"},
		prefill("p8", 0).Label(tp, "8"), prefill("p4", 0).Label(tp, "4"), decode("d", 0).Label(tp, "2"))
	f("another engine is cut", decodeFirst, pick{"p2", "d", "always"},
		prefill("p1", 0).Label(pool.LabelEngine, "sglang"), prefill("p2", 1), decode("d", 0))
	f("another engine is cut, prefill first", prefillFirst, pick{"p1", "d2", "prefill-first"},
		prefill("p1", 0).Label(pool.LabelEngine, "sglang"), decode("d1", 0), decode("d2", 1).Label(pool.LabelEngine, "sglang"))
	f("only another engine", decodeFirst, pick{"", "d", "its engine differs from the other phase's endpoint"},
		prefill("p1", 0).Label(pool.LabelEngine, "sglang"), prefill("p2", 0).Label(pool.LabelEngine, "sglang"), decode("d", 0))
	f("vLLM, said and unsaid", decodeFirst, pick{"p1", "d", "always"}, prefill("p1", 0).Label(pool.LabelEngine, ""), decode("d", 0))

	t.Run("prefill first, no decode fits", func(t *testing.T) {
		_, err := load(t, twoProfiles(prefillFirst)).Schedule(query(pooltest.Snapshot(prefill("p", 0).Label(tp, "2"), decode("d", 0).Label(tp, "1")), "x"))
		if none, ok := errors.AsType[*scheduler.NoCandidateError](err); !ok || none.Removed[1] != (scheduler.Removal{By: scheduler.ByPair, Reason: "prefill's tensor parallel size is larger than decode's", Count: 1}) {
			t.Errorf("%v", err)
		}
	})
}

// TestPairsAsksTheSame: engine and tensor parallel size count in Scheduler.Pairs, too.
func TestPairsAsksTheSame(t *testing.T) {
	const tp = pool.LabelTensorParallel
	snap := pooltest.Snapshot(pooltest.E("one").Label(tp, "1"), pooltest.E("two").Label(tp, "2"), pooltest.E("unsaid"), pooltest.E("other").Label(pool.LabelEngine, "sglang"))
	s := load(t, "")
	f := func(prefill, decode int, want bool) {
		t.Helper()
		if got := s.Pairs(snap.Endpoints[prefill], snap.Endpoints[decode]); got != want {
			t.Errorf("%s to %s: %v", snap.Endpoints[prefill].Name, snap.Endpoints[decode].Name, got)
		}
	}
	f(0, 1, true)
	f(1, 0, false)
	f(1, 2, true)
	f(2, 0, true)
	f(2, 3, false)
	f(3, 2, false)
}

// TestNeedsPrefill: where the decode endpoint cannot do without, prefill runs whatever else speaks against it.
func TestNeedsPrefill(t *testing.T) {
	const must = "decode endpoint cannot prefill"
	noDecider := `{type: disagg-profile-handler}`
	never := `{type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}`
	f := func(name, text string, change func(q *scheduler.Query), wantPick, wantReason string, wantWanted bool) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			q := query(pdPool(), "x")
			q.NeedsPrefill = func(decode *pool.Endpoint) bool { return decode.Name == "d1" }
			q.Reserve = true
			if change != nil {
				change(q)
			}
			d, err := load(t, text).Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Release()
			p := d.Phase(scheduler.PhasePrefill)
			if names(p) != wantPick || p.Reason != wantReason || p.Run != (wantPick != "") || p.Wanted != wantWanted || p.Run != (p.Reservation != nil) {
				t.Errorf("%q, %q, %+v, want %q, %q, wanted %v", names(p), p.Reason, p, wantPick, wantReason, wantWanted)
			}
			p.Reservation.Release()
			d.Phase(scheduler.PhaseDecode).Reservation.Release()
			for _, e := range q.Snapshot.Endpoints {
				if e.Load.Requests() != 0 || e.Load.Tokens() != 0 {
					t.Errorf("%s keeps %d requests", e.Name, e.Load.Requests())
				}
			}
		})
	}
	only := func(q *scheduler.Query) { q.OnlyDecode, q.OnlyReason = true, "off" }
	other := func(q *scheduler.Query) { q.NeedsPrefill = func(*pool.Endpoint) bool { return false } }
	f("the decider says no", twoProfiles(never), nil, "p1", must, false)
	f("another decode endpoint", twoProfiles(never), other, "", "short prompt", false)
	f("only decode", twoProfiles(decodeFirst), only, "p1", must, false)
	f("only decode, another decode endpoint", twoProfiles(decodeFirst), func(q *scheduler.Query) { only(q); other(q) }, "", "off", false)
	f("no decider", twoProfiles(noDecider), nil, "p1", must, false)
	f("prefill first", twoProfiles(prefillFirst), nil, "p1", "prefill-first", false)
	f("prefill first, only decode", twoProfiles(prefillFirst), only, "p1", must, false)
	f("prefill first, only decode, another decode endpoint", twoProfiles(prefillFirst), func(q *scheduler.Query) { only(q); other(q) }, "", "off", false)
	f("no prefill endpoint", twoProfiles(decodeFirst), func(q *scheduler.Query) {
		only(q)
		q.Snapshot = pooltest.Snapshot(pooltest.E("d1").Role("decode"))
	}, "", "role does not prefill", true)
	f("the only prefill endpoint decodes", twoProfiles(decodeFirst), func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("d1").Role("both"))
	}, "", "it decodes this request", true)
	f("no prefill profile", one, func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("d1").Role("decode"))
	}, "", "no profile", false)

	t.Run("the pair decider says no", func(t *testing.T) {
		snap := pdPool()
		for i, speed := range []int64{400, 400, 8000, 8000} {
			learned(snap.Endpoints[i], speed, 0)
		}
		q := query(snap, strings.Repeat("a", long))
		s := load(t, costSample("{exploreOneIn: 0}"))
		for _, needs := range []bool{false, true} {
			q.NeedsPrefill = func(*pool.Endpoint) bool { return needs }
			d, err := s.Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			if p := d.Phase(scheduler.PhasePrefill); p.Run != needs || needs && p.Reason != must {
				t.Errorf("needs %v: run %v, %s", needs, p.Run, p.Reason)
			}
			d.Release()
		}
	})
}

// TestSource: the endpoint that holds the longest part of the prompt, where fetching it is worth while.
func TestSource(t *testing.T) {
	text := strings.Repeat("a", 64*256) // 64 blocks
	f := func(name string, change func(q *scheduler.Query, s *scheduler.Scheduler), wantDecode, wantPrefill string, endpoints ...*pooltest.Builder) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			s := load(t, twoProfiles(decodeFirst)+"disaggregation: {pairLabels: [rev]}\n")
			q := query(pooltest.Snapshot(endpoints...), text)
			q.Pulls = true
			if change != nil {
				change(q, s)
			}
			d, err := s.Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Release()
			got := [2]string{}
			for i, ph := range []scheduler.Phase{scheduler.PhaseDecode, scheduler.PhasePrefill} {
				if e := d.Phase(ph).Source; e != nil {
					got[i] = e.Name
				}
			}
			if got != [2]string{wantDecode, wantPrefill} {
				t.Errorf("%q, want %q and %q", got, wantDecode, wantPrefill)
			}
		})
	}
	pd := func() []*pooltest.Builder {
		return []*pooltest.Builder{
			pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"),
			pooltest.E("p1").Role("prefill").Waiting(9), pooltest.E("d1").Role("decode").Waiting(9),
		}
	}
	// holds teaches that the i-th endpoint holds so many blocks.
	holds := func(q *scheduler.Query, s *scheduler.Scheduler, i, blocks int) {
		s.Learn(prompt(text[:blocks*256]), q.Snapshot.Endpoints[i], nil)
	}
	f("nobody holds anything", nil, "", "", pd()...)
	f("one that is no candidate of the profile", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 3, 32) }, "d1", "d1", pd()...)
	f("the longest one", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 2, 16); holds(q, s, 3, 32) }, "d1", "d1", pd()...)
	f("one phase's endpoint holds it", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 1, 32) }, "", "d0", pd()...)
	f("the picked one holds as much", func(q *scheduler.Query, s *scheduler.Scheduler) {
		holds(q, s, 0, 32)
		holds(q, s, 1, 32)
		holds(q, s, 3, 32)
	}, "", "", pd()...)
	f("one block, just worth it", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 3, 1) }, "d1", "d1", pd()...)
	f("less than a transfer is worth", func(q *scheduler.Query, s *scheduler.Scheduler) {
		q.Request = prompt(text[:100])
		s.Learn(q.Request, q.Snapshot.Endpoints[3], nil)
	}, "", "", pd()...)
	f("not asked for", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 3, 32); q.Pulls = false }, "", "", pd()...)
	f("not ready", func(q *scheduler.Query, s *scheduler.Scheduler) {
		holds(q, s, 3, 32)
		q.Snapshot.Endpoints[3].Health.SetReady(false)
	}, "", "", pd()...)
	f("ejected, and let stay since half its role is", func(q *scheduler.Query, s *scheduler.Scheduler) {
		holds(q, s, 3, 32)
		for _, i := range []int{1, 3} {
			for range pool.EjectAfter {
				q.Snapshot.Endpoints[i].Health.Fail(q.Now.Add(time.Duration(i) * -time.Second))
			}
		}
	}, "", "", pd()...)
	f("on probation", func(q *scheduler.Query, s *scheduler.Scheduler) {
		holds(q, s, 3, 32)
		for range pool.EjectAfter {
			q.Snapshot.Endpoints[3].Health.Fail(q.Now.Add(-2 * pool.EjectFor))
		}
	}, "", "", pd()...)
	f("another engine", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 2, 32) }, "", "",
		pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"), pooltest.E("x").Role("both").Waiting(9).Label(pool.LabelEngine, "sglang"))
	f("another revision", func(q *scheduler.Query, s *scheduler.Scheduler) { holds(q, s, 2, 32) }, "", "",
		pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"), pooltest.E("x").Role("both").Waiting(9).Label("rev", "2"))

	t.Run("equal ones share the work", func(t *testing.T) {
		s := load(t, "")
		q := query(pooltest.Snapshot(pooltest.E("idle"), pooltest.E("a").Waiting(9), pooltest.E("b").Waiting(9), pooltest.E("c").Waiting(9)), text)
		q.Pulls = true
		for i := 1; i < 4; i++ {
			s.Learn(prompt(text[:256]), q.Snapshot.Endpoints[i], nil)
		}
		seen := map[string]int{}
		for seed := range uint64(300) {
			q.Seed = seed + 1
			d, err := s.Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			seen[d.Phase(scheduler.PhaseDecode).Source.Name]++
			d.Release()
		}
		if len(seen) != 3 || min(seen["a"], seen["b"], seen["c"]) < 60 {
			t.Errorf("%v", seen)
		}
	})
}
