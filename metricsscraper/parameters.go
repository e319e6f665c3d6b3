// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
)

// Source is how pages are fetched: the parameters of a metrics-data-source (llm-d-router v0.10).
type Source struct {
	Scheme             string        `yaml:"scheme"`             // http (default) | https
	Path               string        `yaml:"path"`               // default /metrics
	Port               uint16        `yaml:"port"`               // 0 (default) = the endpoint's own
	Interval           time.Duration `yaml:"interval"`           // 0 (default) = none; else a lower bound of the interval
	InsecureSkipVerify bool          `yaml:"insecureSkipVerify"` // default true
	CACertPath         string        `yaml:"caCertPath"`         // PEM file
	ClientCertPath     string        `yaml:"clientCertPath"`     // PEM file, with ClientKeyPath
	ClientKeyPath      string        `yaml:"clientKeyPath"`
}

// DefaultSource is a metrics-data-source without parameters.
func DefaultSource() Source {
	return Source{Scheme: "http", Path: "/metrics", InsecureSkipVerify: true}
}

// DecodeSource reads the parameters of a metrics-data-source.
func DecodeSource(p config.Parameters) (Source, error) {
	s := DefaultSource()
	if err := p.Decode(&s); err != nil {
		return Source{}, err
	}
	var errs []error
	if s.Scheme != "http" && s.Scheme != "https" {
		errs = append(errs, p.Errorf("scheme", "%q, must be http or https", s.Scheme))
	}
	if s.Path == "" || s.Path[0] != '/' {
		errs = append(errs, p.Errorf("path", "%q, must begin with /", s.Path))
	}
	if s.Interval < 0 {
		errs = append(errs, p.Errorf("interval", "%s, must be ≥ 0", s.Interval))
	}
	if (s.ClientCertPath == "") != (s.ClientKeyPath == "") {
		errs = append(errs, p.Errorf("clientCertPath", "clientCertPath and clientKeyPath go together"))
	}
	return s, errors.Join(errs...)
}

// Engines knows which families of which engine mean what: the parameters of a core-metrics-extractor. Immutable.
type Engines struct {
	labelKey string
	fallback string
	tables   map[string]*table
	// CustomMetrics reports that customMetrics were configured, which nothing reads yet.
	CustomMetrics bool
}

// DefaultEngines is a core-metrics-extractor without parameters.
func DefaultEngines() *Engines {
	x := &Engines{labelKey: pool.LabelEngine, fallback: "vllm", tables: map[string]*table{}}
	for name, e := range builtinEngines() {
		x.tables[name] = compile(e)
	}
	return x
}

// of is the table for an endpoint: by its engine label, else the default engine; an unknown engine is read as the
// default one.
func (x *Engines) of(e *pool.Endpoint) *table {
	name := e.Labels[x.labelKey]
	if name == "" && x.labelKey == pool.LabelEngine {
		name = e.Labels[pool.LabelEngineGIE]
	}
	if t := x.tables[name]; t != nil {
		return t
	}
	return x.tables[x.fallback]
}

// engineConfig is one element of engineConfigs; what it leaves out stays as built in for an engine of that name.
type engineConfig struct {
	Name                    string              `yaml:"name"`
	QueuedRequestsSpec      string              `yaml:"queuedRequestsSpec"`
	RunningRequestsSpec     string              `yaml:"runningRequestsSpec"`
	KVUsageSpec             string              `yaml:"kvUsageSpec"`
	LoRASpec                string              `yaml:"loraSpec"`
	CacheInfoSpec           string              `yaml:"cacheInfoSpec"`
	CacheBlockSizeLabelName string              `yaml:"cacheBlockSizeLabelName"`
	CacheNumBlocksLabelName string              `yaml:"cacheNumBlocksLabelName"`
	CacheBlockSizeSpec      string              `yaml:"cacheBlockSizeSpec"`
	CacheNumBlocksSpec      string              `yaml:"cacheNumBlocksSpec"`
	CustomMetrics           []config.Parameters `yaml:"customMetrics"`
}

// DecodeEngines reads the parameters of a core-metrics-extractor.
func DecodeEngines(p config.Parameters) (*Engines, error) {
	params := struct {
		EngineLabelKey string         `yaml:"engineLabelKey"`
		DefaultEngine  string         `yaml:"defaultEngine"`
		EngineConfigs  []engineConfig `yaml:"engineConfigs"`
	}{EngineLabelKey: pool.LabelEngine, DefaultEngine: "vllm"}
	if err := p.Decode(&params); err != nil {
		return nil, err
	}
	x := DefaultEngines()
	x.labelKey, x.fallback = params.EngineLabelKey, params.DefaultEngine
	var errs []error
	seen := map[string]bool{}
	builtin := builtinEngines()
	for i, c := range params.EngineConfigs {
		path := fmt.Sprintf("engineConfigs[%d]", i)
		if c.Name == "" || seen[c.Name] {
			errs = append(errs, p.Errorf(path+".name", "%q, must be a name that is not there yet", c.Name))
			continue
		}
		seen[c.Name] = true
		e := builtin[c.Name]
		errs = append(errs, c.overlay(&e, p, path)...)
		x.tables[c.Name] = compile(e)
		x.CustomMetrics = x.CustomMetrics || len(c.CustomMetrics) > 0
	}
	if x.tables[x.fallback] == nil {
		errs = append(errs, p.Errorf("defaultEngine", "%q, no such engine", x.fallback))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return x, nil
}

// overlay replaces what c gives.
func (c *engineConfig) overlay(e *engine, p config.Parameters, path string) []error {
	var errs []error
	for _, row := range []struct {
		key, text string
		sig       signal
	}{
		{"queuedRequestsSpec", c.QueuedRequestsSpec, sigWaiting},
		{"runningRequestsSpec", c.RunningRequestsSpec, sigRunning},
		{"kvUsageSpec", c.KVUsageSpec, sigKVUsage},
		{"loraSpec", c.LoRASpec, sigLoRA},
		{"cacheInfoSpec", c.CacheInfoSpec, sigCacheInfo},
		{"cacheBlockSizeSpec", c.CacheBlockSizeSpec, sigBlockSize},
		{"cacheNumBlocksSpec", c.CacheNumBlocksSpec, sigNumBlocks},
	} {
		if row.text == "" {
			continue
		}
		sp, err := parseSpec(row.text)
		if err != nil {
			errs = append(errs, p.Errorf(path+"."+row.key, "%v", err))
			continue
		}
		e.specs[row.sig] = []spec{sp}
	}
	e.blockSizeLabel = cmp.Or(c.CacheBlockSizeLabelName, e.blockSizeLabel, "block_size")
	e.numBlocksLabel = cmp.Or(c.CacheNumBlocksLabelName, e.numBlocksLabel, "num_gpu_blocks")
	return errs
}
