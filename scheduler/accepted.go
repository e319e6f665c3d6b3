// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"maps"
	"slices"
	"time"

	"github.com/baton-epp/baton/config"
)

// The types of this file stand in llm-d's files for work that Baton does elsewhere, or for sections that are not acted
// upon yet. Their parameters are checked here, but for those that another package decodes.

// elsewhere is a plugin whose parameters another package owns and decodes: where endpoints and metrics come from.
type elsewhere struct{}

func newElsewhere(*Builder, config.Parameters) (any, error) { return elsewhere{}, nil }

// UtilizationDetector holds the parameters of a utilization-detector; nothing sheds by it yet.
type UtilizationDetector struct {
	QueueDepthThreshold       int           `yaml:"queueDepthThreshold"`       // requests per endpoint, default 5
	KVCacheUtilThreshold      float64       `yaml:"kvCacheUtilThreshold"`      // fraction, 0–1, default 0.8
	MetricsStalenessThreshold time.Duration `yaml:"metricsStalenessThreshold"` // default 200ms
	Headroom                  float64       `yaml:"headroom"`                  // fraction over the limits, default 0
}

func newUtilizationDetector(_ *Builder, raw config.Parameters) (any, error) {
	p := &UtilizationDetector{QueueDepthThreshold: 5, KVCacheUtilThreshold: .8, MetricsStalenessThreshold: 200 * time.Millisecond}
	if err := raw.Decode(p); err != nil {
		return nil, err
	}
	switch {
	case p.QueueDepthThreshold <= 0:
		return nil, raw.Errorf("queueDepthThreshold", "%d, must be > 0", p.QueueDepthThreshold)
	case p.KVCacheUtilThreshold <= 0 || p.KVCacheUtilThreshold > 1:
		return nil, raw.Errorf("kvCacheUtilThreshold", "%v, must be > 0 and ≤ 1", p.KVCacheUtilThreshold)
	case p.MetricsStalenessThreshold <= 0:
		return nil, raw.Errorf("metricsStalenessThreshold", "%v, must be > 0", p.MetricsStalenessThreshold)
	case p.Headroom < 0:
		return nil, raw.Errorf("headroom", "%v, must be ≥ 0", p.Headroom)
	}
	return p, nil
}

// unparametrised is a plugin type without parameters.
type unparametrised struct{}

func newUnparametrised(_ *Builder, raw config.Parameters) (any, error) {
	return unparametrised{}, raw.Decode(&unparametrised{})
}

type usageLimit struct {
	Threshold float64 `yaml:"threshold"` // default 1
}

func newUsageLimit(_ *Builder, raw config.Parameters) (any, error) {
	p := &usageLimit{Threshold: 1}
	if err := raw.Decode(p); err != nil {
		return nil, err
	}
	if p.Threshold < 0 {
		return nil, raw.Errorf("threshold", "%v, must be ≥ 0", p.Threshold)
	}
	return p, nil
}

// headersHandler names the profiles whose picks become headers; Baton sets them in any case.
type headersHandler struct {
	PrefillProfile string `yaml:"prefillProfile"` // default prefill
	EncodeProfile  string `yaml:"encodeProfile"`  // default encode
}

func newHeadersHandler(_ *Builder, raw config.Parameters) (any, error) {
	p := &headersHandler{PrefillProfile: "prefill", EncodeProfile: "encode"}
	return p, raw.Decode(p)
}

// notNegative checks numbers by their path.
func notNegative(raw config.Parameters, values map[string]int) error {
	for _, path := range slices.Sorted(maps.Keys(values)) {
		if values[path] < 0 {
			return raw.Errorf(path, "%d, must be ≥ 0", values[path])
		}
	}
	return nil
}
