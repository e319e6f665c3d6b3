// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/baton-epp/baton/config"
)

// The types of this file stand in llm-d's files for work that Baton does elsewhere, or for sections that are not acted
// upon yet: their parameters are checked, and kept for the packages that want them ([Plugins]).

// MetricsSource holds the parameters of a metrics-data-source (reference config.md 2.6).
type MetricsSource struct {
	Scheme string `yaml:"scheme"` // http (default) or https
	Path   string `yaml:"path"`   // default /metrics
	Port   int    `yaml:"port"`   // 0 (default) = the endpoint's own
	// Interval is the time between scrapes; 0 (default) = adaptive.
	Interval           time.Duration `yaml:"interval"`
	InsecureSkipVerify bool          `yaml:"insecureSkipVerify"` // default true
	CACertPath         string        `yaml:"caCertPath"`
	ClientCertPath     string        `yaml:"clientCertPath"`
	ClientKeyPath      string        `yaml:"clientKeyPath"`
}

// DefaultMetricsSource is llm-d's, used where the file configures none.
func DefaultMetricsSource() *MetricsSource {
	return &MetricsSource{Scheme: "http", Path: "/metrics", InsecureSkipVerify: true}
}

func newMetricsSource(_ *Builder, raw config.Parameters) (any, error) {
	p := DefaultMetricsSource()
	if err := raw.Decode(p); err != nil {
		return nil, err
	}
	switch {
	case p.Scheme != "http" && p.Scheme != "https":
		return nil, raw.Errorf("scheme", "%q, must be http or https", p.Scheme)
	case p.Port < 0 || p.Port > 65535:
		return nil, raw.Errorf("port", "%d, must be between 0 and 65535", p.Port)
	case p.Interval < 0:
		return nil, raw.Errorf("interval", "%v, must be ≥ 0", p.Interval)
	case (p.ClientCertPath == "") != (p.ClientKeyPath == ""):
		return nil, raw.Errorf("clientCertPath", "clientCertPath and clientKeyPath go together")
	}
	return p, nil
}

// CoreExtractor holds the parameters of a core-metrics-extractor: which metrics of which engine are what.
type CoreExtractor struct {
	EngineLabelKey string         `yaml:"engineLabelKey"` // default llm-d.ai/engine-type
	DefaultEngine  string         `yaml:"defaultEngine"`  // default vllm
	EngineConfigs  []EngineConfig `yaml:"engineConfigs"`  // added to, or in the place of, the built-in ones
}

// EngineConfig names one engine's metrics. A spec is a metric name, with labels as in name{label=value,…}; empty = the
// built-in one.
type EngineConfig struct {
	Name                    string         `yaml:"name"`
	QueuedRequestsSpec      string         `yaml:"queuedRequestsSpec"`
	RunningRequestsSpec     string         `yaml:"runningRequestsSpec"`
	KVUsageSpec             string         `yaml:"kvUsageSpec"`
	LoRASpec                string         `yaml:"loraSpec"`
	CacheInfoSpec           string         `yaml:"cacheInfoSpec"`
	CacheBlockSizeLabelName string         `yaml:"cacheBlockSizeLabelName"`
	CacheNumBlocksLabelName string         `yaml:"cacheNumBlocksLabelName"`
	CacheBlockSizeSpec      string         `yaml:"cacheBlockSizeSpec"`
	CacheNumBlocksSpec      string         `yaml:"cacheNumBlocksSpec"`
	CustomMetrics           []CustomMetric `yaml:"customMetrics"`
}

// CustomMetric publishes any gauge as an attribute; accepted, nothing reads attributes yet.
type CustomMetric struct {
	AttributeKey string `yaml:"attributeKey"`
	MetricSpec   string `yaml:"metricSpec"`
}

// DefaultCoreExtractor is llm-d's, used where the file configures none.
func DefaultCoreExtractor() *CoreExtractor {
	return &CoreExtractor{EngineLabelKey: "llm-d.ai/engine-type", DefaultEngine: "vllm"}
}

func newCoreExtractor(b *Builder, raw config.Parameters) (any, error) {
	p := DefaultCoreExtractor()
	if err := raw.Decode(p); err != nil {
		return nil, err
	}
	for i, e := range p.EngineConfigs {
		if e.Name == "" {
			return nil, raw.Errorf(fmt.Sprintf("engineConfigs[%d].name", i), "is required")
		}
		if len(e.CustomMetrics) > 0 {
			b.Warn("engineConfigs[%d].customMetrics: nothing reads attributes yet", i)
		}
	}
	return p, nil
}

// FileDiscovery holds the parameters of a file-discovery (reference config.md 5).
type FileDiscovery struct {
	Path      string `yaml:"path"`      // required
	WatchFile bool   `yaml:"watchFile"` // default false
}

func newFileDiscovery(_ *Builder, raw config.Parameters) (any, error) {
	p := &FileDiscovery{}
	if err := raw.Decode(p); err != nil {
		return nil, err
	}
	if p.Path == "" {
		return nil, raw.Errorf("path", "is required")
	}
	return p, nil
}

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
