// SPDX-License-Identifier: Apache-2.0

package scorers_test

import (
	"testing"

	"github.com/baton-epp/baton/scheduler/schedulertest"
	"github.com/baton-epp/baton/scorers"
)

func TestContract(t *testing.T) {
	schedulertest.Contract(t, scorers.Registry(), map[string]string{
		"load-aware-scorer/threshold":          "{threshold: 3}",
		"active-request-scorer/idle":           "{idleThreshold: 1, maxBusyScore: 0.5}",
		"token-load-scorer/small":              "{queueThresholdTokens: 2000}",
		"prefix-cache-scorer/length":           "{matchLengthWeight: 0.5, matchLengthScaleTokens: 100}",
		"session-affinity-scorer/session id":   "{strategy: session_id}",
		"session-affinity-scorer/other header": "{encodedEndpointHeaderConfig: {header: X-Session-Id}}",
	})
}
