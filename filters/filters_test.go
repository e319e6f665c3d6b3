// SPDX-License-Identifier: Apache-2.0

package filters_test

import (
	"testing"

	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scheduler/schedulertest"
)

func TestFilters(t *testing.T) {
	var builders []*pooltest.Builder
	for _, role := range []string{"decode", "prefill", "encode", "both", "prefill-decode", "encode-prefill", "encode-prefill-decode", "nonsense"} {
		builders = append(builders, pooltest.E(role).Role(role).Label("zone", "a"))
	}
	builders = append(builders, pooltest.E("unlabeled"))
	snap := pooltest.Snapshot(builders...)

	f := func(name, kind, parameters, want string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			t.Helper()
			plugin := scheduler.Plugins[scheduler.Filter](schedulertest.New(t, filters.Registry(), kind, parameters))[kind]
			cands := make([]scheduler.Candidate, len(snap.Endpoints))
			for i, e := range snap.Endpoints {
				cands[i] = scheduler.Candidate{Endpoint: e, Metrics: e.Metrics()}
			}
			kept, _ := plugin.Filter(&scheduler.Cycle{}, cands)
			endpoints := make([]*pool.Endpoint, kept)
			for i := range endpoints {
				endpoints[i] = cands[i].Endpoint
			}
			if got := pooltest.Names(endpoints...); got != want {
				t.Errorf("kept %q, want %q", got, want)
			}
		})
	}
	const all = "decode prefill encode both prefill-decode encode-prefill encode-prefill-decode nonsense unlabeled"
	f("decode", "decode-filter", "", "decode both prefill-decode encode-prefill-decode unlabeled")
	f("prefill", "prefill-filter", "", "prefill both prefill-decode encode-prefill encode-prefill-decode")
	f("encode", "encode-filter", "", "encode encode-prefill encode-prefill-decode")
	f("selector without parameters", "label-selector-filter", "", all)
	f("matchLabels", "label-selector-filter", "{matchLabels: {zone: a, llm-d.ai/role: decode}}", "decode")
	f("In", "label-selector-filter", "{matchExpressions: [{key: llm-d.ai/role, operator: In, values: [decode, both]}]}", "decode both")
	f("NotIn, which an absent label passes", "label-selector-filter", "{matchExpressions: [{key: zone, operator: NotIn, values: [a]}]}", "unlabeled")
	f("Exists", "by-label-selector", "{matchExpressions: [{key: zone, operator: Exists}, {key: llm-d.ai/role, operator: In, values: [encode]}]}", "encode")
	f("DoesNotExist", "label-selector-filter", "{matchExpressions: [{key: zone, operator: DoesNotExist}]}", "unlabeled")
	f("by label", "by-label", "{label: llm-d.ai/role, validValues: [decode, encode]}", "decode encode")
	f("by label, absent allowed", "by-label", "{label: llm-d.ai/role, validValues: [decode], allowsNoLabel: true}", "decode unlabeled")
}
