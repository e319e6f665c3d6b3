// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// picks counts who is picked first for n requests with different seeds; each ends before the next begins.
func picks(t *testing.T, s *scheduler.Scheduler, q *scheduler.Query, n int) map[string]int {
	t.Helper()
	out := map[string]int{}
	for i := range n {
		q.Seed = uint64(i) + 1
		d, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		out[d.Phase(scheduler.PhaseDecode).Ranked[0].Endpoint.Name]++
		d.Phase(scheduler.PhaseDecode).Reservation.Release()
		d.Release()
	}
	return out
}

func fail(e *pool.Endpoint, at time.Time) {
	for range pool.EjectAfter {
		e.Health.Fail(at)
	}
}

const one = "plugins: [{type: queue-scorer}]"

// TestFailFast: one of four endpoints fails at once; after its ejection under 1 % of requests see it.
func TestFailFast(t *testing.T) {
	s, snap := load(t, ""), pooltest.Idle(4)
	now := time.Now()
	q := query(snap, "x")
	q.Reserve = true
	seen := 0
	for i := range 2000 {
		now = now.Add(10 * time.Millisecond) // 20 s in all
		q.Now, q.Seed = now, uint64(i)+1
		d, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		pick := d.Phase(scheduler.PhaseDecode)
		if e := pick.Ranked[0].Endpoint; e.Name == "p0" {
			seen++
			e.Health.Fail(now)
		} else {
			e.Health.Succeed()
		}
		pick.Reservation.Release()
		d.Release()
	}
	if seen > 20 || seen < pool.EjectAfter {
		t.Errorf("%d of 2000 requests saw the failing endpoint", seen)
	}
}

// TestEjected: at most half of a role's endpoints are out; those whose ejection ends first stay.
func TestEjected(t *testing.T) {
	now := time.Now()
	f := func(name string, ejected []int, want string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			snap := pooltest.Snapshot(pooltest.E("d0").Role("decode"), pooltest.E("d1").Role("decode"), pooltest.E("d2").Role("decode"),
				pooltest.E("p0").Role("prefill"), pooltest.E("p1").Role("prefill"), pooltest.E("p2").Role("prefill"))
			for i, n := range ejected {
				fail(snap.Endpoints[n], now.Add(time.Duration(i)*time.Second))
			}
			q := query(snap, "x")
			q.Now, q.Rank = now.Add(5*time.Second), 10
			d, err := load(t, "").Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Release()
			got := map[string]bool{}
			for n := range strings.FieldsSeq(names(d.Phase(scheduler.PhaseDecode))) {
				got[n] = true
			}
			if fmt.Sprint(got) != want {
				t.Errorf("%v, want %s", got, want)
			}
		})
	}
	f("none", nil, "map[d0:true d1:true d2:true]")
	f("one", []int{1}, "map[d0:true d2:true]")
	f("two of three", []int{1, 0}, "map[d1:true d2:true]")
	f("all", []int{2, 0, 1}, "map[d0:true d2:true]")
	f("other roles do not count", []int{3, 4, 5, 0}, "map[d1:true d2:true]")
}

// TestProbation: after an ejection one request at a time is a probe, and only the reserved choice claims it.
func TestProbation(t *testing.T) {
	s := load(t, one)
	snap := pooltest.Snapshot(pooltest.E("sick"), pooltest.E("busy").Waiting(50))
	now := time.Now()
	fail(snap.Endpoints[0], now)
	q := query(snap, "x")
	q.Now = now.Add(pool.EjectFor + time.Second)
	if got := picks(t, s, q, 10); got["sick"] != 10 {
		t.Errorf("without reservations: %v, want all on the idle one", got)
	}
	q.Reserve = true
	if got := picks(t, s, q, 10); got["sick"] != 1 {
		t.Errorf("%v, want one probe", got)
	}
	snap.Endpoints[0].Health.Succeed()
	if got := picks(t, s, q, 10); got["sick"] != 10 {
		t.Errorf("after the probe succeeded: %v, want all on the idle one", got)
	}
}

func TestUnusable(t *testing.T) {
	snap := pooltest.Snapshot(pooltest.E("gone"), pooltest.E("asleep").Sleeping(), pooltest.E("busy").Waiting(5))
	snap.Endpoints[0].Health.SetReady(false)
	if got := picks(t, load(t, one), query(snap, "x"), 10); got["busy"] != 10 {
		t.Errorf("%v, want all on the busy one", got)
	}
}

func TestSubset(t *testing.T) {
	snap := pooltest.Idle(100)
	f := func(name string, want int, addrs ...string) {
		t.Helper()
		sub := scheduler.Subset{Given: true}
		for _, a := range addrs {
			sub.Addrs = append(sub.Addrs, netip.MustParseAddrPort(a))
		}
		q := query(snap, "x")
		q.Subset, q.Rank = sub, 1000
		d, err := load(t, one).Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Release()
		if got := len(d.Phase(scheduler.PhaseDecode).Ranked); got != want {
			t.Errorf("%s: %d endpoints, want %d", name, got, want)
		}
	}
	f("one", 1, "192.168.1.3:8000")
	f("twice the same", 1, "192.168.1.3:8000", "192.168.1.3:8000")
	f("another port", 1, "192.168.1.3:8000", "192.168.1.4:8001")
	many := make([]string, 0, 60)
	for i := 60; i > 0; i-- {
		many = append(many, fmt.Sprintf("192.168.1.%d:8000", i))
	}
	f("many, not in order", 60, many...)
}

// TestRampUp: a new endpoint's share grows with its age; a pool of new endpoints only is served evenly.
func TestRampUp(t *testing.T) {
	const n = 4000
	now := time.Now()
	share := func(ages ...time.Duration) float64 {
		builders := make([]*pooltest.Builder, len(ages))
		for i, age := range ages {
			builders[i] = pooltest.E(fmt.Sprintf("p%d", i)).Born(now.Add(-age))
		}
		q := query(pooltest.Snapshot(builders...), "x")
		q.Now = now
		return float64(picks(t, load(t, one), q, n)["p0"]) / n
	}
	f := func(name string, low, high float64, ages ...time.Duration) {
		t.Helper()
		if got := share(ages...); got < low || got > high {
			t.Errorf("%s: share %.3f, want %.2f to %.2f", name, got, low, high)
		}
	}
	f("just born", 0.005, 0.03, 0, time.Hour)
	f("half-way", 0.22, 0.3, pool.RampUp/2, time.Hour)
	f("grown up", 0.46, 0.54, pool.RampUp, time.Hour)
	f("all just born", 0.46, 0.54, 0, 0)
	f("all young", 0.44, 0.54, 5*time.Second, 5500*time.Millisecond)
}
