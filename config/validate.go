// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// validator checks what a strict decode cannot see. Out of range is refused, never clamped.
type validator struct {
	*decoder
	warnings []*problem

	// Where folded sections stand in the file; empty = their present place.
	detectorPath, parserPath, sourcesPath string
}

// fail notes a problem at path, unless something is wrong there or above it already.
func (v *validator) fail(path, format string, args ...any) {
	known := func(p *problem) bool {
		rest, below := strings.CutPrefix(path, p.path)
		return p.path != "" && below && (rest == "" || rest[0] == '.' || rest[0] == '[')
	}
	if !slices.ContainsFunc(v.problems, known) {
		v.add(nearest(v.lines, path), path, format, args...)
	}
}

func (v *validator) warn(path, text string) {
	v.warnings = append(v.warnings, &problem{file: v.file, line: nearest(v.lines, path), path: path, text: text})
}

func (v *validator) oneOf(path, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		v.fail(path, "%s, must be one of %s", show(value), strings.Join(allowed, ", "))
	}
}

func (v *validator) positive(path string, d time.Duration) {
	if d <= 0 {
		v.fail(path, "%s, must be > 0", formatDuration(d))
	}
}

func within[T cmp.Ordered](v *validator, path string, value, low, high T) {
	if value < low || value > high {
		v.fail(path, "%v, must be between %v and %v", value, low, high)
	}
}

func (v *validator) atLeastOne(path string, value int64) {
	if value < 1 {
		v.fail(path, "%d, must be ≥ 1", value)
	}
}

func (v *validator) check(c *Config) {
	v.oneOf("apiVersion", c.APIVersion, APIVersion, APIVersionGIE)
	v.oneOf("kind", c.Kind, Kind)
	v.checkGates(c)
	names := v.checkPlugins(c)
	v.checkProfiles(c, names)
	v.checkDataLayer(&c.DataLayer, names)
	v.checkFlowControl(c, names)
	for i, p := range c.RequestHandler.Parsers {
		v.ref(names, cmp.Or(v.parserPath, fmt.Sprintf("requestHandler.parsers[%d]", i))+".pluginRef", p.PluginRef, parsers()...)
	}
	v.checkDisaggregation(&c.Disaggregation)
	v.checkSubRequests(&c.Disaggregation)
	v.checkLimits(&c.Limits)
	v.checkScraping(&c.Scraping)
}

// parsers are the parser types, which need not be defined to be referred to (llm-d-router v0.10).
func parsers() []string {
	return []string{"openai-parser", "anthropic-parser", "vllmhttp-parser", "sglanghttp-parser", "vllmgrpc-parser", "vertexai-parser", "passthrough-parser"}
}

func (v *validator) checkGates(c *Config) {
	known := gates()
	for i, entry := range c.FeatureGates {
		path := fmt.Sprintf("featureGates[%d]", i)
		gate, value, given := strings.Cut(entry, "=")
		if _, ok := known[gate]; !ok {
			v.fail(path, "unknown feature gate %s, known: %s", show(gate), strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		} else if given && value != "true" && value != "false" {
			v.fail(path, "%s, must be %s, %s=true or %s=false", show(entry), gate, gate, gate)
		}
	}
}

// checkPlugins returns the names that may be referred to.
func (v *validator) checkPlugins(c *Config) map[string]bool {
	first := map[string]int{}
	names := map[string]bool{}
	for i, p := range c.Plugins {
		path := fmt.Sprintf("plugins[%d]", i)
		if p.Type == "" {
			v.fail(path+".type", "is required")
			continue
		}
		if at, ok := first[p.Name]; ok {
			v.fail(path+".name", "%s is already the name of plugins[%d]", show(p.Name), at)
			continue
		}
		first[p.Name] = i
		names[p.Name] = true
	}
	return names
}

// ref checks a reference; undefined names are allowed only when listed.
func (v *validator) ref(names map[string]bool, path, name string, undefined ...string) {
	switch {
	case name == "":
		v.fail(path, "is required")
	case !names[name] && !slices.Contains(undefined, name):
		v.fail(path, "no plugin is named %s", show(name))
	}
}

func (v *validator) checkProfiles(c *Config, names map[string]bool) {
	first := map[string]int{}
	for i, p := range c.SchedulingProfiles {
		path := fmt.Sprintf("schedulingProfiles[%d]", i)
		if at, ok := first[p.Name]; ok && p.Name != "" {
			v.fail(path+".name", "%s is already the name of schedulingProfiles[%d]", show(p.Name), at)
		}
		first[p.Name] = i
		if p.Name == "" {
			v.fail(path+".name", "is required")
		}
		for j, plugin := range p.Plugins {
			below := fmt.Sprintf("%s.plugins[%d]", path, j)
			v.ref(names, below+".pluginRef", plugin.PluginRef)
			if plugin.Weight < 0 {
				v.fail(below+".weight", "%v, must be ≥ 0", plugin.Weight)
			}
		}
	}
}

func (v *validator) checkDataLayer(l *DataLayer, names map[string]bool) {
	sources := cmp.Or(v.sourcesPath, "dataLayer.sources")
	for i, s := range l.Sources {
		path := sources + "[" + strconv.Itoa(i) + "]"
		v.ref(names, path+".pluginRef", s.PluginRef)
		for j, e := range s.Extractors {
			v.ref(names, fmt.Sprintf("%s.extractors[%d].pluginRef", path, j), e.PluginRef)
		}
	}
	if v.given("dataLayer.discovery") {
		v.ref(names, "dataLayer.discovery.pluginRef", l.Discovery.PluginRef)
	}
	if v.given("dataLayer.peerDiscovery") {
		v.ref(names, "dataLayer.peerDiscovery.pluginRef", l.PeerDiscovery.PluginRef)
		v.warn("dataLayer.peerDiscovery", "is not built yet; replicas do not find each other")
	}
	if l.CrossReplicaSyncer != "" {
		v.ref(names, "dataLayer.crossReplicaSyncerPluginRef", l.CrossReplicaSyncer)
		v.warn("dataLayer.crossReplicaSyncerPluginRef", "is not built yet; replicas exchange nothing")
	}
	v.positive("dataLayer.crossReplicaSyncInterval", l.CrossReplicaSyncInterval)
}

// given reports whether the file has a key.
func (v *validator) given(path string) bool { return v.lines[path] > 0 }

func (v *validator) checkFlowControl(c *Config, names map[string]bool) {
	f := c.FlowControl
	switch {
	case c.Gate("flowControl"):
		v.warn("featureGates", "flowControl is not built yet: requests are not queued")
	case f != nil && v.given("flowControl"):
		v.warn("flowControl", "is ignored while the feature gate flowControl is off")
	}
	if f == nil {
		return
	}
	v.notNegative("flowControl.defaultRequestTTL", &f.DefaultRequestTTL)
	v.notNegative("flowControl.noEndpointRequestTTL", f.NoEndpointRequestTTL)
	if f.UsageLimitPolicy != "" {
		v.ref(names, "flowControl.usageLimitPolicyPluginRef", f.UsageLimitPolicy, "static-usage-limit-policy")
	}
	v.checkBand("flowControl.defaultPriorityBand", f.DefaultPriorityBand, names)
	v.checkBand("flowControl.defaultNegativePriorityBand", f.DefaultNegativePriorityBand, names)
	first := map[int]int{}
	for i := range f.PriorityBands {
		b := &f.PriorityBands[i]
		path := fmt.Sprintf("flowControl.priorityBands[%d]", i)
		if at, ok := first[b.Priority]; ok {
			v.fail(path+".priority", "%d is already the priority of priorityBands[%d]", b.Priority, at)
		}
		first[b.Priority] = i
		v.checkBand(path, b, names)
	}
	v.checkDetector(cmp.Or(v.detectorPath, "flowControl.saturationDetector"), f.SaturationDetector, names)
}

func (v *validator) notNegative(path string, d *time.Duration) {
	if d != nil && *d < 0 {
		v.fail(path, "%s, must be ≥ 0", formatDuration(*d))
	}
}

func (v *validator) checkBand(path string, b *PriorityBand, names map[string]bool) {
	if b == nil {
		return
	}
	if b.FairnessPolicy != "" {
		v.ref(names, path+".fairnessPolicyRef", b.FairnessPolicy, "global-strict-fairness-policy")
	}
	if b.OrderingPolicy != "" {
		v.ref(names, path+".orderingPolicyRef", b.OrderingPolicy, "fcfs-ordering-policy")
	}
}

func (v *validator) checkDetector(path string, s *SaturationDetector, names map[string]bool) {
	if s == nil {
		return
	}
	v.warn(path, "is not built yet: a full pool sheds nothing")
	if s.PluginRef != "" {
		v.ref(names, path+".pluginRef", s.PluginRef, "utilization-detector")
	}
	if q := s.QueueDepthThreshold; q != nil {
		v.atLeastOne(path+".queueDepthThreshold", int64(*q))
	}
	if kv := s.KVCacheUtilThreshold; kv != nil && (*kv <= 0 || *kv > 1) {
		v.fail(path+".kvCacheUtilThreshold", "%v, must be > 0 and ≤ 1", *kv)
	}
	if d := s.MetricsStalenessThreshold; d != nil {
		v.positive(path+".metricsStalenessThreshold", *d)
	}
}

func (v *validator) checkLimits(l *Limits) {
	v.atLeastOne("limits.maxBodyBytes", l.MaxBodyBytes)
	if l.MaxHeldBytes != 0 && l.MaxHeldBytes < l.MaxBodyBytes {
		v.fail("limits.maxHeldBytes", "%s, must be ≥ maxBodyBytes (%s), or auto", formatQuantity(l.MaxHeldBytes), formatQuantity(l.MaxBodyBytes))
	}
}

func (v *validator) checkScraping(s *Scraping) {
	v.positive("scraping.busyInterval", s.BusyInterval)
	v.positive("scraping.idleInterval", s.IdleInterval)
	if s.IdleInterval < s.BusyInterval {
		v.fail("scraping.idleInterval", "%s, must be ≥ busyInterval (%s)", formatDuration(s.IdleInterval), formatDuration(s.BusyInterval))
	}
	v.positive("scraping.timeout", s.Timeout)
	within(v, "scraping.maxPageBytes", s.MaxPageBytes, 1, math.MaxInt32)
	v.oneOf("scraping.nameFilter", s.NameFilter, "auto", "never")
}
