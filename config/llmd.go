// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"reflect"
	"slices"
	"time"
)

// DataLayer says where endpoints and their metrics come from (llm-d-router v0.10).
type DataLayer struct {
	// InjectDefaults adds metrics-data-source with core-metrics-extractor unless a source of that name is listed.
	InjectDefaults bool     `yaml:"injectDefaults"`
	Sources        []Source `yaml:"sources,omitempty"`
	// Discovery names the plugin that finds endpoints; its presence switches Kubernetes off.
	Discovery Ref `yaml:"discovery,omitempty"`
	// PeerDiscovery and CrossReplicaSyncer are accepted and not acted upon yet.
	PeerDiscovery            Ref           `yaml:"peerDiscovery,omitempty"`
	CrossReplicaSyncer       string        `yaml:"crossReplicaSyncerPluginRef,omitempty"`
	CrossReplicaSyncInterval time.Duration `yaml:"crossReplicaSyncInterval"` // default 200ms
}

// Source is a data source with the extractors that read it.
type Source struct {
	PluginRef  string `yaml:"pluginRef"`
	Extractors []Ref  `yaml:"extractors,omitempty"`
}

// Ref is a reference to a plugin by name.
type Ref struct {
	PluginRef string `yaml:"pluginRef"`
}

// FlowControl is llm-d's section of that name; sizes and counts of 0 mean no limit.
type FlowControl struct {
	MaxBytes             int64          `yaml:"maxBytes,quantity"`
	MaxRequests          int64          `yaml:"maxRequests,quantity"`
	DefaultRequestTTL    time.Duration  `yaml:"defaultRequestTTL"`              // default 60s, 0s = none
	NoEndpointRequestTTL *time.Duration `yaml:"noEndpointRequestTTL,omitempty"` // nil follows DefaultRequestTTL

	DefaultPriorityBand         *PriorityBand  `yaml:"defaultPriorityBand,omitempty"`
	DefaultNegativePriorityBand *PriorityBand  `yaml:"defaultNegativePriorityBand,omitempty"` // nil = DefaultPriorityBand
	PriorityBands               []PriorityBand `yaml:"priorityBands,omitempty"`

	UsageLimitPolicy   string              `yaml:"usageLimitPolicyPluginRef,omitempty"`
	SaturationDetector *SaturationDetector `yaml:"saturationDetector,omitempty"`
	EnableEviction     bool                `yaml:"enableEviction"`
}

func (f *FlowControl) begin(int) { f.DefaultRequestTTL = time.Minute }

// PriorityBand bounds one band of requests; a size or count of 0 means the default.
type PriorityBand struct {
	Priority       int    `yaml:"priority,omitempty"`
	MaxBytes       int64  `yaml:"maxBytes,quantity"`    // default 1G
	MaxRequests    int64  `yaml:"maxRequests,quantity"` // default 5000
	FairnessPolicy string `yaml:"fairnessPolicyRef,omitempty"`
	OrderingPolicy string `yaml:"orderingPolicyRef,omitempty"`
}

func (b *PriorityBand) begin(int) { b.MaxBytes, b.MaxRequests = 1e9, 5000 }

// SaturationDetector names the plugin that says when the pool is full. The thresholds are the older file's way to
// configure utilization-detector; nil = that plugin's defaults.
type SaturationDetector struct {
	PluginRef                 string         `yaml:"pluginRef,omitempty"`
	QueueDepthThreshold       *int           `yaml:"queueDepthThreshold,omitempty"`       // requests per endpoint
	KVCacheUtilThreshold      *float64       `yaml:"kvCacheUtilThreshold,omitempty"`      // fraction, 0–1
	MetricsStalenessThreshold *time.Duration `yaml:"metricsStalenessThreshold,omitempty"` // > 0
}

// RequestHandler lists the parsers of request bodies.
type RequestHandler struct {
	Parsers []Ref `yaml:"parsers,omitempty"`
}

// document is a file as it may stand: a Config and the sections that fold into it.
type document struct {
	Config             `yaml:",inline"`
	SaturationDetector *SaturationDetector `yaml:"saturationDetector"` // deprecated place of flowControl.saturationDetector
	Parser             *Ref                `yaml:"parser"`             // deprecated place of requestHandler.parsers
	Data               *oldData            `yaml:"data"`               // the older file's dataLayer
}

// oldData is the `data` section of the older file.
type oldData struct {
	Sources    []Source `yaml:"sources"`
	Extractors []Ref    `yaml:"extractors"` // read every source
}

func reflectValue(d *document) reflect.Value { return reflect.ValueOf(d).Elem() }

// place gives plugins their default names and tells absent parameter blocks where they would stand.
func (d *document) place(file string) {
	for i := range d.Plugins {
		p := &d.Plugins[i]
		if p.Name == "" {
			p.Name = p.Type
		}
		if p.Parameters.root == nil {
			p.Parameters = Parameters{file: file, path: fmt.Sprintf("plugins[%d].parameters", i), root: &node{line: p.Line}}
		}
	}
}

// fold moves deprecated and older sections to their present places, unless those are taken.
func (v *validator) fold(d *document) {
	if d.SaturationDetector != nil {
		if d.FlowControl == nil {
			d.FlowControl = &FlowControl{}
			d.FlowControl.begin(0)
		}
		if d.FlowControl.SaturationDetector == nil {
			d.FlowControl.SaturationDetector = d.SaturationDetector
		}
		v.detectorPath = "saturationDetector"
	}
	if d.Parser != nil && len(d.RequestHandler.Parsers) == 0 {
		d.RequestHandler.Parsers = []Ref{*d.Parser}
		v.parserPath = "parser"
	}
	if d.Data == nil {
		return
	}
	if len(d.DataLayer.Sources) > 0 {
		v.fail("data", "is the older name of dataLayer; give only one of them")
		return
	}
	v.sourcesPath = "data.sources"
	for _, s := range d.Data.Sources {
		s.Extractors = append(slices.Clip(s.Extractors), d.Data.Extractors...)
		d.DataLayer.Sources = append(d.DataLayer.Sources, s)
	}
}
