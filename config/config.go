// SPDX-License-Identifier: Apache-2.0

// Package config reads the configuration file: a [Config] is one EndpointPickerConfig with defaults applied,
// strictly decoded and checked, every problem reported at once with file, line and path. Plugin parameters stay raw
// ([Parameters]); each plugin decodes its own. Floor 0: it imports only the YAML library and knows no plugin kinds.
package config

import (
	"slices"
	"strings"
	"time"
)

// Kind is the only kind of file there is.
const Kind = "EndpointPickerConfig"

// The accepted values of apiVersion, the current one first (llm-d-router v0.10).
const (
	APIVersion    = "llm-d.ai/v1alpha1"
	APIVersionGIE = "inference.networking.x-k8s.io/v1alpha1"
)

// DefaultWeight is a scorer's weight where the file gives none (llm-d's default).
const DefaultWeight = 1.0

// Config is a whole EndpointPickerConfig, defaults applied. Read-only after Load.
type Config struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	// FeatureGates are "gate", "gate=true" or "gate=false"; see Gate.
	FeatureGates []string `yaml:"featureGates,omitempty"`
	// Plugins in file order. A file with neither plugins nor profiles gets those of Default.
	Plugins []Plugin `yaml:"plugins"`
	// SchedulingProfiles may be empty although plugins are there: the scheduler then makes one named "default" of every
	// filter, scorer and picker, since only it knows which plugin is what.
	SchedulingProfiles []Profile      `yaml:"schedulingProfiles,omitempty"`
	DataLayer          DataLayer      `yaml:"dataLayer"`
	FlowControl        *FlowControl   `yaml:"flowControl,omitempty"` // nil when absent; validated, not acted upon yet
	RequestHandler     RequestHandler `yaml:"requestHandler,omitempty"`
	Disaggregation     Disaggregation `yaml:"disaggregation"`
	Limits             Limits         `yaml:"limits"`
	Scraping           Scraping       `yaml:"scraping"`

	// Warnings are things an operator should know about a file that loads, each with file and line.
	Warnings []string `yaml:"-"`
}

// Plugin is one configured plugin.
type Plugin struct {
	Name       string     `yaml:"name"` // default: the type
	Type       string     `yaml:"type"`
	Parameters Parameters `yaml:"parameters,omitempty"`
	Line       int        `yaml:"-"` // where it stands in the file, 0 for built-in defaults
}

func (p *Plugin) begin(line int) { p.Line = line }

// Profile is a named list of filters, weighted scorers and a picker.
type Profile struct {
	Name    string          `yaml:"name"`
	Plugins []ProfilePlugin `yaml:"plugins"`
	Line    int             `yaml:"-"`
}

func (p *Profile) begin(line int) { p.Line = line }

// ProfilePlugin is a plugin's place in a profile.
type ProfilePlugin struct {
	PluginRef string  `yaml:"pluginRef"`
	Weight    float64 `yaml:"weight"` // 0 or more, default 1; only scorers have one
	Line      int     `yaml:"-"`
}

func (p *ProfilePlugin) begin(line int) { p.Line, p.Weight = line, DefaultWeight }

// gates are the known feature gates and whether they are on by default. Those of the older file (dataLayer,
// prepareDataPlugins) name what is always there now.
func gates() map[string]bool {
	return map[string]bool{"flowControl": false, "haPopulateNonLeaderDatastore": true, "dataLayer": true, "prepareDataPlugins": true}
}

// Gate reports whether a feature gate is on: the last entry of FeatureGates about it, else its default.
func (c *Config) Gate(name string) bool {
	on := gates()[name]
	for _, entry := range c.FeatureGates {
		if gate, value, given := strings.Cut(entry, "="); gate == name {
			on = !given || value == "true"
		}
	}
	return on
}

// Default is the configuration used when no file is given: llm-d's default profile (llm-d-router v0.10).
func Default() *Config {
	c := defaults()
	c.APIVersion, c.Kind = APIVersion, Kind
	c.fillPlugins()
	return c
}

// defaults is what a file is decoded over.
func defaults() *Config {
	return &Config{
		DataLayer:      DataLayer{InjectDefaults: true, CrossReplicaSyncInterval: 200 * time.Millisecond},
		Disaggregation: defaultDisaggregation(),
		Limits:         Limits{MaxBodyBytes: 64 << 20},
		Scraping: Scraping{
			BusyInterval: 50 * time.Millisecond,
			IdleInterval: 2 * time.Second,
			Timeout:      time.Second,
			MaxPageBytes: 4 << 20,
			NameFilter:   "auto",
		},
	}
}

// schedulesNothing reports whether a file says where endpoints and metrics come from and nothing of how to pick: it then
// gets the default profile, as no file at all does.
func (c *Config) schedulesNothing() bool {
	return len(c.SchedulingProfiles) == 0 && !slices.ContainsFunc(c.Plugins, func(p Plugin) bool {
		switch p.Type {
		case "file-discovery", "metrics-data-source", "core-metrics-extractor":
			return false
		default:
			return !strings.HasSuffix(p.Type, "-parser")
		}
	})
}

// fillPlugins puts llm-d's default plugins and profile into a configuration that has none.
func (c *Config) fillPlugins() {
	for _, name := range []string{
		"queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer", "max-score-picker",
		"single-profile-handler", "metrics-data-source", "core-metrics-extractor",
	} {
		if !slices.ContainsFunc(c.Plugins, func(p Plugin) bool { return p.Name == name || p.Type == name }) {
			c.Plugins = append(c.Plugins, Plugin{Name: name, Type: name})
		}
	}
	c.SchedulingProfiles = []Profile{{Name: "default", Plugins: []ProfilePlugin{
		{PluginRef: "queue-scorer", Weight: 2},
		{PluginRef: "kv-cache-utilization-scorer", Weight: 2},
		{PluginRef: "prefix-cache-scorer", Weight: 3},
		{PluginRef: "max-score-picker", Weight: DefaultWeight},
	}}}
	if len(c.DataLayer.Sources) == 0 && !slices.ContainsFunc(c.Plugins, func(p Plugin) bool { return p.Line != 0 && p.Type != "file-discovery" }) {
		c.DataLayer.Sources = []Source{{PluginRef: "metrics-data-source", Extractors: []Ref{{PluginRef: "core-metrics-extractor"}}}}
	}
}

// Load reads a file strictly; file is its name for messages. The error joins every problem with file, line and path.
func Load(file string, data []byte) (*Config, error) {
	root, problems := parse(file, data)
	if root == nil {
		return nil, joined(problems)
	}
	c := &document{Config: *defaults()}
	d := &decoder{file: file, lines: map[string]int{"": 1}, problems: problems}
	if root.kind == kindNull {
		d.add(1, "", "the file is empty")
		return nil, joined(d.problems)
	}
	d.decode(root, reflectValue(c), "", "")
	c.place(file)
	v := &validator{decoder: d}
	v.fold(c)
	v.check(&c.Config)
	if err := joined(d.problems); err != nil {
		return nil, err
	}
	slices.SortStableFunc(v.warnings, func(a, b *problem) int { return a.line - b.line })
	for _, w := range v.warnings {
		c.Warnings = append(c.Warnings, w.Error())
	}
	if c.schedulesNothing() {
		c.fillPlugins()
	}
	return &c.Config, nil
}
