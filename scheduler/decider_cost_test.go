// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scheduler/schedulertest"
)

// costSample is a P/D file around a cost-pd-decider with those parameters.
func costSample(parameters string) string {
	return strings.Replace(pdSample, "type: prefix-based-pd-decider, parameters: {nonCachedTokens: 512}", "type: cost-pd-decider, parameters: "+parameters, 1)
}

// learned teaches a speed in tokens per second and a wait.
func learned(e *pool.Endpoint, speed int64, wait time.Duration) {
	e.Pace.Prefilled(speed, time.Second)
	if wait > 0 {
		for range 200 {
			e.Pace.Prefilled(0, wait)
		}
	}
}

func TestCostDecider(t *testing.T) {
	const blocks = 128 // of 64 tokens: 8,192
	type side struct {
		speed    int64
		wait     time.Duration
		inFlight int64
		matched  int32
		transfer time.Duration
		warm     bool
	}
	f := func(name, parameters string, decode, prefill side, wantRun bool, wantReason string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			t.Helper()
			snap := pooltest.Snapshot(pooltest.E("d"), pooltest.E("p"))
			cands := make([]scheduler.Candidate, 2)
			for i, s := range []side{decode, prefill} {
				e := snap.Endpoints[i]
				cands[i] = scheduler.Candidate{Endpoint: e, Metrics: e.Metrics(), Tokens: s.inFlight}
				cands[i].Matched[0] = s.matched
				if s.speed > 0 {
					learned(e, s.speed, s.wait)
				}
				if s.transfer > 0 {
					e.Pace.Received(8192, s.transfer)
				}
				if s.warm {
					e.Warm.Add(1)
				}
			}
			cy := &scheduler.Cycle{Phase: scheduler.PhasePrefill, Now: time.Now(), Seed: 1}
			cy.Prompts[0] = scheduler.Prompt{Blocks: blocks, BlockSize: 64, Tokens: blocks * 64}
			d := scheduler.Plugins[scheduler.PairDecider](schedulertest.New(t, nil, "cost-pd-decider", parameters))["cost-pd-decider"]
			if run, reason := d.DecidePair(cy, &cands[0], &cands[1]); run != wantRun || reason != wantReason {
				t.Errorf("%v, %q, want %v, %q", run, reason, wantRun, wantReason)
			}
		})
	}
	const faster, local, unknown = "prefill apart is faster", "the decode endpoint prefills faster", "speeds not learned yet"
	f("nothing learned", "", side{}, side{}, true, unknown)
	f("nothing learned, aggregate", "{unknown: aggregate}", side{}, side{}, false, unknown)
	f("one side learned", "{unknown: aggregate}", side{speed: 8000}, side{}, false, unknown)
	f("a faster prefill endpoint", "", side{speed: 4000}, side{speed: 8000}, true, faster)
	f("a slower prefill endpoint", "", side{speed: 8000}, side{speed: 4000}, false, local)
	f("equal ones and a transfer", "", side{speed: 8000, transfer: 100 * time.Millisecond}, side{speed: 8000}, false, local)
	f("the decode endpoint waits", "", side{speed: 8000, wait: time.Second, transfer: 100 * time.Millisecond}, side{speed: 8000}, true, faster)
	f("the prefill endpoint waits", "", side{speed: 4000}, side{speed: 8000, wait: 2 * time.Second}, false, local)
	f("tokens in flight at the decode endpoint", "", side{speed: 8000, inFlight: 8000, transfer: 100 * time.Millisecond}, side{speed: 8000}, true, faster)
	f("tokens in flight at the prefill endpoint", "", side{speed: 4000}, side{speed: 8000, inFlight: 16_000}, false, local)
	f("tokens in flight and the wait they caused count once", "", side{speed: 8000, wait: time.Second, inFlight: 8000}, side{speed: 5000}, true, faster)
	f("tokens in flight and the wait they caused count once, the other side", "", side{speed: 8000, wait: time.Second, inFlight: 8000}, side{speed: 3500}, false, local)
	f("cached at the decode endpoint", "", side{speed: 4000, matched: 120}, side{speed: 8000}, false, local)
	f("cached at both", "", side{speed: 4000, matched: 96}, side{speed: 8000, matched: 120}, true, faster)
	f("cached at the prefill endpoint", "", side{speed: 8000, transfer: 100 * time.Millisecond}, side{speed: 4000, matched: 120}, true, faster)
	f("not enough of an advantage", "{advantage: 3}", side{speed: 4000}, side{speed: 8000}, false, local)
	f("decode endpoints are to be spared", "{advantage: 0.3}", side{speed: 8000}, side{speed: 4000}, true, faster)
	f("a handshake", "{handshake: 5s}", side{speed: 4000}, side{speed: 8000}, false, local)
	f("no handshake any more", "{handshake: 5s}", side{speed: 4000, warm: true}, side{speed: 8000}, true, faster)
}

// TestCostDeciderInDecisions: a no leaves the load counts as they were, the prefill reserves nothing.
func TestCostDeciderInDecisions(t *testing.T) {
	snap := pooltest.Snapshot(pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"))
	p, d := snap.Endpoints[0], snap.Endpoints[1]
	s := load(t, costSample("{exploreOneIn: 0}"))
	schedule := func(bytes int) (pick scheduler.Pick) {
		t.Helper()
		q := query(snap, strings.Repeat("a", bytes))
		q.Reserve, q.Rank, q.Pulls = true, 3, true
		dec, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Release()
		pick = *dec.Phase(scheduler.PhasePrefill)
		pick.Reservation.Release()
		dec.Phase(scheduler.PhaseDecode).Reservation.Release()
		if pick.Run != (len(pick.Ranked) > 0) || pick.Run != (pick.Reservation != nil) || pick.Run != (pick.Send > 0) || pick.Wanted || pick.Source != nil {
			t.Errorf("half a pick: %+v", pick)
		}
		return pick
	}
	if pick := schedule(400); pick.Run || pick.Reason != "short prompt" {
		t.Errorf("100 tokens: %v, %s", pick.Run, pick.Reason)
	}
	if pick := schedule(long); !pick.Run || pick.Reason != "speeds not learned yet" {
		t.Errorf("nothing learned: %v, %s", pick.Run, pick.Reason)
	}
	learned(p, 4000, 0)
	learned(d, 8000, 0)
	started := p.Load.Started()
	if pick := schedule(long); pick.Run || pick.Reason != "the decode endpoint prefills faster" {
		t.Errorf("slow prefill endpoint: %v, %s", pick.Run, pick.Reason)
	}
	if p.Load.Started() != started || p.Load.Requests() != 0 || p.Load.Tokens() != 0 {
		t.Errorf("declined: %d requests, %d tokens, %d started, before %d", p.Load.Requests(), p.Load.Tokens(), p.Load.Started(), started)
	}
	for range 200 {
		d.Pace.Prefilled(0, 5*time.Second)
	}
	if pick := schedule(long); !pick.Run || pick.Reason != "prefill apart is faster" {
		t.Errorf("the decode endpoint waits: %v, %s", pick.Run, pick.Reason)
	}
	s.Learn(prompt(strings.Repeat("a", long)), d, nil)
	if pick := schedule(long); pick.Run || pick.Reason != "prompt cached on the decode endpoint" {
		t.Errorf("cached: %v, %s", pick.Run, pick.Reason)
	}
}

// TestCostDeciderClaimsNoProbe: the one probe of a prefill endpoint on probation is left to a request that goes there.
func TestCostDeciderClaimsNoProbe(t *testing.T) {
	snap := pooltest.Snapshot(pooltest.E("p0").Role("prefill"), pooltest.E("p1").Role("prefill"), pooltest.E("d0").Role("decode"))
	failed := time.Now().Add(-2 * pool.EjectFor)
	for _, e := range snap.Endpoints[:2] {
		learned(e, 4000, 0)
		for range pool.EjectAfter {
			e.Health.Fail(failed)
		}
	}
	learned(snap.Endpoints[2], 8000, 0)
	q := query(snap, strings.Repeat("a", long))
	q.Reserve = true
	d, err := load(t, costSample("{exploreOneIn: 0}")).Schedule(q)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Release()
	if pick := d.Phase(scheduler.PhasePrefill); pick.Run {
		t.Fatalf("prefill runs: %s", pick.Reason)
	}
	for _, e := range snap.Endpoints[:2] {
		if !e.Health.TryProbe(q.Now) {
			t.Errorf("%s: somebody has its probe", e.Name)
		}
	}
}

// TestCostDeciderExplores: one request in so many takes the other way, the same one whenever it is asked.
func TestCostDeciderExplores(t *testing.T) {
	snap := pooltest.Snapshot(pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"))
	learned(snap.Endpoints[0], 4000, 0)
	learned(snap.Endpoints[1], 8000, 0)
	f := func(parameters string, low, high int) {
		t.Helper()
		s, explored := load(t, costSample(parameters)), 0
		for seed := range uint64(3200) {
			run := func() bool {
				q := query(snap, strings.Repeat("a", long))
				q.Seed = seed + 1
				d, err := s.Schedule(q)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Release()
				pick := d.Phase(scheduler.PhasePrefill)
				if pick.Run != (pick.Reason == "the other way, to keep both learned") {
					t.Fatalf("%v, %s", pick.Run, pick.Reason)
				}
				return pick.Run
			}
			first := run()
			if first != run() {
				t.Errorf("seed %d: another answer the second time", seed)
			}
			if first {
				explored++
			}
		}
		if explored < low || explored > high {
			t.Errorf("%s: %d of 3200 explored, want %d to %d", parameters, explored, low, high)
		}
	}
	f("{}", 60, 140)
	f("{exploreOneIn: 4}", 700, 900)
	f("{exploreOneIn: 0}", 0, 0)
}

func TestCostDeciderRefuses(t *testing.T) {
	f := func(parameters, want string) {
		t.Helper()
		_, err := tryLoad(t, "plugins: [{type: cost-pd-decider, parameters: "+parameters+"}]")
		if want = "test.yaml:3: plugins[0].parameters." + want; err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", parameters, err, want)
		}
	}
	f("{minTokens: -1}", "minTokens: -1, must be ≥ 0")
	f("{advantage: 0}", "advantage: 0, must be > 0")
	f("{advantage: .nan}", "advantage: must be a number, is NaN")
	f("{unknown: maybe}", `unknown: "maybe", must be disaggregate or aggregate`)
	f("{exploreOneIn: 1}", "exploreOneIn: 1 would send every request the slower way; must be 0 or ≥ 2")
	f("{handshake: -1s}", "handshake: -1s, must be ≥ 0")
	f("{speed: 1}", "speed: unknown key, known here: minTokens, advantage, unknown, exploreOneIn, handshake")
}

// TestCostDeciderAllocations: what a decision allocates are its reservations.
func TestCostDeciderAllocations(t *testing.T) {
	f := func(name string, decodeSpeed int64, ceiling float64) {
		t.Helper()
		snap := pdPool()
		for _, e := range snap.Endpoints {
			speed := int64(4000)
			if e.Role.Has(pool.RoleDecode) {
				speed = decodeSpeed
			}
			learned(e, speed, 0)
		}
		s := load(t, costSample("{}"))
		q := query(snap, strings.Repeat("a", long))
		q.Reserve, q.Pulls = true, true
		q.NeedsPrefill = func(*pool.Endpoint) bool { return false }
		q.Seed = 1
		alloctest.AtMost(t, ceiling, name, func() {
			d, err := s.Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			if run := d.Phase(scheduler.PhasePrefill).Run; run != (ceiling == 2) {
				t.Fatalf("%s: prefill runs %v", name, run)
			}
			for ph := range d.Picks {
				d.Picks[ph].Reservation.Release()
			}
			d.Release()
		})
	}
	f("apart", 1000, 2)
	f("declined", 8000, 1)
}
