// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"maps"
	"strings"
	"testing"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// TestBothLegsOnEngines runs the wires whose legs run at once between simulated engines: the answer is that of one engine
// alone, and nobody holds anything afterwards.
func TestBothLegsOnEngines(t *testing.T) {
	body := strings.Replace(clientBody, `"max_tokens":4`, `"temperature":0,"max_tokens":4`, 1)
	for _, c := range []struct{ wire, engine, connector string }{
		{"sglang", "sglang", ""}, {"mooncake", "", "mooncake"}, {"offloading", "", "offloading"},
	} {
		t.Run(c.wire, func(t *testing.T) {
			r := newRig(t, func(d *config.Disaggregation) {
				d.KVConnector, d.ParallelLegs = map[string]string{"": c.wire}, true
			})
			peers := simulate.NewRegistry()
			add := func(name, role string, engine, connector string) (*simulate.Engine, *pool.Endpoint) {
				sim, e := r.engine(name, role, peers, func(o *simulate.Options) { o.Engine, o.Connector = engine, connector })
				maps.Copy(e.Labels, sim.Labels())
				return sim, e
			}
			p, pe := add("p", "prefill", c.engine, c.connector)
			d, de := add("d", "decode", c.engine, c.connector)
			_, plain := add("plain", "", "", "")
			_, want := decode(t, plain, &Job{Request: r.job(inference.Completions, body, nil).Request, Body: r.job(inference.Completions, body, nil).Body})
			for range 2 {
				j := r.job(inference.Completions, body, de, pe)
				out, err := r.Run(t.Context(), j)
				if err != nil || out.Pending() == nil {
					t.Fatalf("%+v, %v", out, err)
				}
				if err := r.Forward(t.Context(), j, out, de); err != nil {
					t.Fatal(err)
				}
				if status, text := decode(t, de, j); status != 200 || text != want {
					t.Errorf("%d %q, want %q", status, text, want)
				}
				<-out.Pending()
				if err := r.Settle(t.Context(), j, out); err != nil || reasons(out) != "ok" || out.PrefillTokens == 0 {
					t.Errorf("%+v, %v", out, err)
				}
				r.Leave(j, out, false)
			}
			r.background.Wait()
			r.idle()
			eventually(t, "nothing held", func() bool { return len(p.Held()) == 0 && len(d.Held()) == 0 })
		})
	}
}
