// SPDX-License-Identifier: Apache-2.0

package scorers

import "github.com/baton-epp/baton/scheduler"

// Registry lists the scorers by llm-d's type names; prefill-time-scorer and warm-pair-scorer are Baton's own.
func Registry() scheduler.Registry {
	return scheduler.Registry{
		"active-request-scorer":        newActiveRequest,
		"kv-cache-utilization-scorer":  newKVCacheUtilization,
		"load-aware-scorer":            newLoadAware,
		"lora-affinity-scorer":         newLoRAAffinity,
		"prefill-time-scorer":          newPrefillTime,
		"prefix-cache-scorer":          newPrefixCache,
		"queue-scorer":                 newQueue,
		"running-requests-size-scorer": newRunningRequests,
		"session-affinity-scorer":      newSessionAffinity,
		"token-load-scorer":            newTokenLoad,
		"warm-pair-scorer":             newWarmPair,
	}
}
