// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/baton-epp/baton/sidecar/connectors"
)

var (
	metricName = regexp.MustCompile(`baton_[a-z0-9_]+`)
	// wireRow is a row of the table of wires: name, engine, order, how far proven.
	wireRow = regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\|[^|]*\\| ([^|]*) \\| ([^|]*) \\|")
)

// TestDisaggregationMetrics checks that every metric the guide names is documented, and so exists.
func TestDisaggregationMetrics(t *testing.T) {
	documented := read(t, "metrics.md")
	for _, name := range metricName.FindAllString(read(t, "disaggregation.md"), -1) {
		if !strings.Contains(documented, "`"+name+"`") {
			t.Errorf("disaggregation.md names %s, which metrics.md does not", name)
		}
	}
}

// TestDisaggregationWires checks the tables of wires against the registry.
func TestDisaggregationWires(t *testing.T) {
	text := read(t, "disaggregation.md")
	wires, encoders, _ := strings.Cut(text, "| `ecConnector` |")
	_, wires, _ = strings.Cut(wires, "| `kvConnector` |")
	encoders, _, _ = strings.Cut(encoders, "\n\n")
	var named []string
	for _, m := range wireRow.FindAllStringSubmatch(wires, -1) {
		_, traits, err := connectors.Lookup(m[1])
		if err != nil {
			t.Errorf("disaggregation.md: %v", err)
			continue
		}
		named = append(named, m[1])
		if m[3] != traits.Proven {
			t.Errorf("%s is proven by %q, disaggregation.md says %q", m[1], traits.Proven, m[3])
		}
		if atOnce := strings.HasPrefix(m[2], "both at once"); atOnce != (traits.Shape == connectors.Rendezvous) {
			t.Errorf("%s: disaggregation.md says %q", m[1], m[2])
		}
	}
	complete(t, named, func(name string) error { _, _, err := connectors.Lookup(name); return err })
	named = nil
	for _, m := range wireRow.FindAllStringSubmatch(encoders, -1) {
		_, traits, err := connectors.LookupEncoder(m[1])
		if err != nil {
			t.Errorf("disaggregation.md: %v", err)
			continue
		}
		named = append(named, m[1])
		if m[2] != traits.Proven && m[3] != traits.Proven {
			t.Errorf("%s is proven by %q, disaggregation.md says %q", m[1], traits.Proven, m[2])
		}
	}
	complete(t, named, func(name string) error { _, _, err := connectors.LookupEncoder(name); return err })
}

// complete checks that names are all that a registry has: its error about a name that it lacks lists them.
func complete(t *testing.T, names []string, lookup func(name string) error) {
	t.Helper()
	_, list, _ := strings.Cut(lookup("none").Error(), "(built: ")
	for name := range strings.SplitSeq(strings.TrimSuffix(list, ")"), ", ") {
		if !slices.Contains(names, name) {
			t.Errorf("disaggregation.md lacks %s", name)
		}
	}
}
