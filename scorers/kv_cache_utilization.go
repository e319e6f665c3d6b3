// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// kvCacheUtilization is kv-cache-utilization-scorer: 1 − KV cache usage. Unknown: 0.5 (llm-d: 1).
type kvCacheUtilization struct{}

func newKVCacheUtilization(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	return kvCacheUtilization{}, noParameters(raw)
}

// Score implements [scheduler.Scorer].
func (kvCacheUtilization) Score(_ *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	for i := range cands {
		out[i] = 0.5
		if known(&cands[i], pool.HasKVCacheUsage, cands[i].Metrics.KVCacheUsage) {
			out[i] = 1 - min(1, cands[i].Metrics.KVCacheUsage)
		}
	}
}
