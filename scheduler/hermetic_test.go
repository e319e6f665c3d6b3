// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"errors"
	"net/netip"
	"strconv"
	"testing"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/scheduler"
)

// TestHermetic is the table of GIE v1.3.0's integration test as far as it is about picks (its test/integration/epp).
// An endpoint is queue, KV usage and loaded adapters.
func TestHermetic(t *testing.T) {
	const profile = `
plugins: [{type: kv-cache-utilization-scorer}, {type: queue-scorer}, {type: prefix-cache-scorer}, {type: lora-affinity-scorer}, {type: max-score-picker}]
`
	type pod struct {
		queue, kv float64
		adapters  []string
	}
	f := func(name, model, want string, subset []string, pods ...pod) {
		t.Helper()
		for _, limit := range []int{0, 2} {
			t.Run(name+", adapter limit "+strconv.Itoa(limit), func(t *testing.T) {
				builders := make([]*pooltest.Builder, len(pods))
				for i, p := range pods {
					builders[i] = pooltest.E("p"+strconv.Itoa(i)).Waiting(p.queue).KV(p.kv).LoRA(limit, p.adapters...)
				}
				q := query(pooltest.Snapshot(builders...), "test prompt")
				q.Request.Model = model
				for _, a := range subset {
					q.Subset.Given = true
					q.Subset.Addrs = append(q.Subset.Addrs, netip.MustParseAddrPort(a))
				}
				d, err := load(t, profile).Schedule(q)
				if want == "" {
					if !errors.Is(err, scheduler.ErrNoCandidate) {
						t.Errorf("%v, want ErrNoCandidate", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				defer d.Release()
				if got := d.Phase(scheduler.PhaseDecode).Ranked[0].Endpoint.Hostport; got != want {
					t.Errorf("%s, want %s", got, want)
				}
			})
		}
	}
	const target = "sql-lora-1fdg2"
	a := func(names ...string) []string { return names }
	f("1 lower queue and KV", "my-model-12345", "192.168.1.2:8000", nil, pod{3, .2, nil}, pod{0, .1, nil}, pod{10, .2, nil})
	f("2 active LoRA, low queue", target, "192.168.1.2:8000", nil, pod{0, .2, a("foo", "bar")}, pod{0, .1, a("foo", target)}, pod{10, .2, a("foo", "bar")})
	f("3 affinity beats KV", target, "192.168.1.2:8000", nil, pod{10, .2, a("foo", "bar")}, pod{10, .4, a("foo", target)}, pod{10, .3, a("foo")})
	f("4 no shedding", target, "192.168.1.1:8000", nil, pod{6, .2, a("foo", "bar", target)}, pod{0, .85, a("foo")}, pod{10, .9, a("foo")})
	nine := []pod{{0, .2, a("foo")}, {0, .1, a("foo", target)}, {10, .2, a("foo")}}
	f("9 subset of all", target, "192.168.1.2:8000", a("192.168.1.1:8000", "192.168.1.2:8000", "192.168.1.3:8000"), nine...)
	f("10 subset of one", target, "192.168.1.3:8000", a("192.168.1.3:8000"), nine...)
	f("11 subset of none", target, "", a("192.168.1.99:8000"), nine[:2]...)
}
