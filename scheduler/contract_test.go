// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"testing"

	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scheduler/schedulertest"
)

func TestContract(t *testing.T) {
	deciders := scheduler.Registry{}
	for name, construct := range scheduler.Builtin() {
		switch name {
		case "prefix-based-pd-decider", "cost-pd-decider", "always-disagg-pd-decider", "always-disagg-multimodal-decider":
			deciders["tested-"+name] = construct
		}
	}
	schedulertest.Contract(t, deciders, map[string]string{
		"tested-prefix-based-pd-decider/both": "{nonCachedTokens: 500, promptTokens: 600}",
		"tested-cost-pd-decider/handshake":    "{handshake: 5s, advantage: 0.5, unknown: aggregate, exploreOneIn: 2}",
	})
}
