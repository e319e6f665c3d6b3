// SPDX-License-Identifier: Apache-2.0

// Package schedulertest is the contract that every filter, scorer, picker and decider keeps, as a test: [Contract] makes
// each type of a registry and runs it over 0, 1, 2 and 500 candidates, with fresh, stale, missing and nonsensical
// metrics. A plugin that passes writes every score, in range; changes nothing it does not own; gives the same answer
// twice; and allocates nothing.
package schedulertest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// Sizes are the numbers of candidates that every plugin is run with.
func Sizes() []int { return []int{0, 1, 2, 500} }

// Contract runs the contract on every type in registry. parameters gives, by type, the parameters (as YAML in flow
// style, such as "{label: a}") of those that cannot do without; a plugin is also run with each of the variants given
// behind its type and a slash ("session-affinity-scorer/by id").
func Contract(t *testing.T, registry scheduler.Registry, parameters map[string]string) {
	t.Helper()
	for _, kind := range slices.Sorted(maps.Keys(registry)) {
		variants := []string{kind}
		for _, name := range slices.Sorted(maps.Keys(parameters)) {
			if strings.HasPrefix(name, kind+"/") {
				variants = append(variants, name)
			}
		}
		for _, name := range variants {
			t.Run(name, func(t *testing.T) { run(t, New(t, registry, kind, parameters[name])) })
		}
	}
}

// New makes a scheduler whose only configured plugin is of the given type, with parameters in YAML flow style or none;
// [scheduler.Plugins] finds it. A registry without pickers gets one that leaves the order as it is.
func New(tb testing.TB, registry scheduler.Registry, kind, parameters string) *scheduler.Scheduler {
	tb.Helper()
	text := "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- type: " + kind + "\n"
	if parameters != "" {
		text += "  parameters: " + parameters + "\n"
	}
	cfg, err := config.Load(kind+".yaml", []byte(text))
	if err != nil {
		tb.Fatal(err)
	}
	registries := []scheduler.Registry{registry}
	if registry["max-score-picker"] == nil {
		registries = append(registries, scheduler.Registry{
			"max-score-picker": func(*scheduler.Builder, config.Parameters) (any, error) { return inOrder{}, nil },
		})
	}
	s, err := scheduler.New(scheduler.Options{Config: cfg, File: kind + ".yaml", Plugins: registries, Metrics: prometheus.NewRegistry()})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// inOrder is a picker that changes nothing.
type inOrder struct{}

func (inOrder) Pick(_ *scheduler.Cycle, cands []scheduler.Candidate, _ int) int {
	return min(1, len(cands))
}

// run runs whatever the scheduler's plugins are.
func run(t *testing.T, s *scheduler.Scheduler) {
	t.Helper()
	for _, world := range worlds() {
		for _, n := range Sizes() {
			t.Run(fmt.Sprintf("%s/candidates=%d", world.name, n), func(t *testing.T) {
				cands := world.candidates(n)
				for _, p := range scheduler.Plugins[scheduler.Scorer](s) {
					checkScorer(t, p, cands)
				}
				for _, p := range scheduler.Plugins[scheduler.Filter](s) {
					checkFilter(t, p, cands)
				}
				for _, p := range scheduler.Plugins[scheduler.Picker](s) {
					checkPicker(t, p, cands)
				}
				for _, p := range scheduler.Plugins[scheduler.Decider](s) {
					checkDecider(t, p, cands)
				}
			})
		}
	}
}
