// SPDX-License-Identifier: Apache-2.0

package app

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// described lists "name{labels}" of everything a picker registers.
func described(t *testing.T) map[string]string {
	t.Helper()
	s := newStack(t, stackOptions{noEnvoy: true})
	ch := make(chan *prometheus.Desc, 1000)
	s.app.registry.Describe(ch)
	close(ch)
	pattern := regexp.MustCompile(`fqName: "([^"]+)", help: ".*", constLabels: \{([^}]*)\}, variableLabels: \{([^}]*)\}`)
	out := map[string]string{}
	for d := range ch {
		m := pattern.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("unread description: %v", d)
		}
		if strings.HasPrefix(m[1], "go_") || strings.HasPrefix(m[1], "process_") {
			continue // the Go runtime's
		}
		constant := regexp.MustCompile(`="[^"]*"`).ReplaceAllString(m[2], "")
		out[m[1]] = strings.Trim(constant+","+m[3], ",")
	}
	return out
}

// TestMetricsDocumented compares docs/metrics.md with a live registry, name by name and label by label.
func TestMetricsDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\| [a-z]+ \\| ([^|]*) \\|").FindAllStringSubmatch(string(text), -1) {
		if _, twice := documented[m[1]]; twice {
			t.Errorf("docs/metrics.md: %s is there twice", m[1])
		}
		documented[m[1]] = strings.ReplaceAll(strings.ReplaceAll(strings.TrimSpace(m[2]), "`", ""), " ", "")
	}
	live := described(t)
	for name, labels := range live {
		got, ok := documented[name]
		switch {
		case !ok:
			t.Errorf("docs/metrics.md lacks a row for %s{%s}", name, labels)
		case got != labels && (got != "–" || labels != ""):
			t.Errorf("docs/metrics.md: %s has labels %q, the registry says %q", name, got, labels)
		}
	}
	for name := range documented {
		if _, ok := live[name]; !ok {
			t.Errorf("docs/metrics.md has a row for %s, which no picker exposes", name)
		}
	}
}

// TestMetricNamesFollowTheHouse: units at the end, counters end in _total, names of peers or our own prefix.
func TestMetricNamesFollowTheHouse(t *testing.T) {
	names := described(t)
	for name := range names {
		if !strings.HasPrefix(name, "llm_d_epp_") && !strings.HasPrefix(name, "baton_") {
			t.Errorf("%s: the prefix is llm_d_epp_ where llm-d has the quantity, else baton_", name)
		}
	}
	if len(names) < 40 || !slices.Contains([]string{"model_name,target_model_name,fairness_id,priority"}, names["llm_d_epp_request_total"]) {
		t.Errorf("%d metrics, request_total{%s}", len(names), names["llm_d_epp_request_total"])
	}
}
