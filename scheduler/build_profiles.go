// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/baton-epp/baton/config"
)

// defaultProfile is the name of the profile of a file without any (llm-d-router v0.10).
const defaultProfile = "default"

// profiles makes the profiles of the file, or one of every filter, scorer and picker where it has none.
func (a *assembly) profiles(s *Scheduler) map[string]*profile {
	configured := a.config.SchedulingProfiles
	implicit := len(configured) == 0
	if implicit {
		configured = []config.Profile{a.everything()}
	}
	out := map[string]*profile{}
	for i := range configured {
		c := &configured[i]
		p := &profile{name: c.Name}
		for j := range c.Plugins {
			a.addToProfile(s, p, &c.Plugins[j], fmt.Sprintf("schedulingProfiles[%d].plugins[%d]", i, j))
		}
		out[c.Name] = p
	}
	for _, p := range out {
		if p.picker.Picker == nil {
			a.addPicker(s, p)
		}
	}
	return out
}

// everything lists every filter, scorer and the first picker of the file.
func (a *assembly) everything() config.Profile {
	p := config.Profile{Name: defaultProfile}
	picker := false
	for _, b := range a.order {
		_, isFilter := b.value.(Filter)
		_, isScorer := b.value.(Scorer)
		_, isPicker := b.value.(Picker)
		if isFilter || isScorer || isPicker && !picker {
			p.Plugins = append(p.Plugins, config.ProfilePlugin{PluginRef: b.name, Weight: config.DefaultWeight, Line: b.line})
			picker = picker || isPicker
		}
	}
	return p
}

func (a *assembly) addToProfile(s *Scheduler, p *profile, c *config.ProfilePlugin, path string) {
	if !a.defined(c.PluginRef) {
		a.fail(c.Line, path+".pluginRef", "no plugin is named %q", c.PluginRef)
		return
	}
	b := a.plugins[c.PluginRef]
	if b == nil {
		return // its own problem is reported already
	}
	fits := false
	if f, ok := b.value.(Filter); ok {
		p.filters = append(p.filters, profileFilter{Filter: f, name: b.name, timer: s.metrics.timer("Filter", b)})
		fits = true
	}
	if sc, ok := b.value.(Scorer); ok {
		if c.Weight < 0 || math.IsNaN(c.Weight) || math.IsInf(c.Weight, 0) {
			a.fail(c.Line, path+".weight", "%v, must be ≥ 0", c.Weight)
		}
		p.scorers = append(p.scorers, profileScorer{
			Scorer: sc, name: b.name, weight: c.Weight,
			timer: s.metrics.timer("Scorer", b), bad: s.metrics.bad.WithLabelValues(b.name, b.kind),
		})
		fits = true
	}
	if pk, ok := b.value.(Picker); ok {
		if p.picker.Picker != nil {
			a.fail(c.Line, path+".pluginRef", "profile %q already has the picker %q", p.name, p.picker.name)
		}
		p.picker = profilePicker{Picker: pk, name: b.name, timer: s.metrics.timer("Picker", b)}
		fits = true
	}
	if !fits {
		a.fail(c.Line, path+".pluginRef", "%q (%s) is no filter, scorer or picker", b.name, b.kind)
	}
}

// addPicker gives p the first picker of the file, else max-score-picker.
func (a *assembly) addPicker(s *Scheduler, p *profile) {
	var found *built
	for _, b := range a.order {
		if _, ok := b.value.(Picker); ok {
			found = b
			break
		}
	}
	if found == nil {
		found = a.inject("max-score-picker")
	}
	if found == nil {
		return
	}
	if pk, ok := found.value.(Picker); ok {
		p.picker = profilePicker{Picker: pk, name: found.name, timer: s.metrics.timer("Picker", found)}
	}
}

// handler is what a profile handler's constructor returns: names, to be bound when the profiles are there.
type handler struct {
	single                        bool
	decode, prefill, encode       string // profile names
	explicit                      []string
	prefillDecider, encodeDecider Decider
	prefillFirst                  bool
}

// handler binds the one profile handler to the profiles.
func (a *assembly) handler(s *Scheduler, profiles map[string]*profile) {
	var found []*built
	for _, b := range a.order {
		if _, ok := b.value.(*handler); ok {
			found = append(found, b)
		}
	}
	broken := slices.ContainsFunc(a.config.Plugins, func(p config.Plugin) bool { return a.plugins[p.Name] == nil })
	switch {
	case len(found) == 0 && broken:
		return // it may be the broken one
	case len(found) == 0 && len(profiles) > 1:
		a.fail(0, "plugins", "%d scheduling profiles need a profile handler, for instance disagg-profile-handler", len(profiles))
		return
	case len(found) == 0:
		found = append(found, &built{name: "single-profile-handler", kind: "single-profile-handler", value: &handler{single: true}})
	case len(found) > 1:
		a.fail(found[1].line, found[1].name, "is a second profile handler beside %q; exactly one is permitted", found[0].name)
		return
	}
	h, _ := found[0].value.(*handler)
	s.phases = a.bind(h, found[0], profiles)
	s.phases.name, s.phases.kind = found[0].name, found[0].kind
	s.phases.guardRoles = a.builtin()
	s.phases.pairLabels = a.config.Disaggregation.PairLabels
}

// bind finds the handler's profiles.
func (a *assembly) bind(h *handler, b *built, profiles map[string]*profile) phases {
	ph := phases{prefillFirst: h.prefillFirst, prefillDecider: h.prefillDecider, encodeDecider: h.encodeDecider}
	if h.single {
		if len(profiles) != 1 {
			a.fail(b.line, b.name, "%s takes exactly one scheduling profile, there are %d", b.kind, len(profiles))
		}
		for _, p := range profiles {
			ph.decode = p
		}
		return ph
	}
	for _, name := range h.explicit {
		if profiles[name] == nil {
			a.fail(b.line, b.name, "no scheduling profile is named %q", name)
		}
	}
	ph.decode, ph.prefill, ph.encode = profiles[h.decode], profiles[h.prefill], profiles[h.encode]
	if ph.decode == nil && !slices.Contains(h.explicit, h.decode) {
		names := make([]string, 0, len(profiles))
		for name := range profiles {
			names = append(names, name)
		}
		slices.Sort(names)
		a.fail(b.line, b.name, "no scheduling profile is named %q, there are: %s", h.decode, strings.Join(names, ", "))
	}
	return ph
}

// builtin reports whether the configuration comes from no file.
func (a *assembly) builtin() bool {
	return !slices.ContainsFunc(a.config.SchedulingProfiles, func(p config.Profile) bool { return p.Line != 0 }) && len(a.config.SchedulingProfiles) > 0
}
