// SPDX-License-Identifier: Apache-2.0

// Package examples holds configurations to copy; its test keeps them loading.
package examples

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/app"
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/datastore"
	"github.com/baton-epp/baton/pool"
)

// TestExamples: each configuration loads without a warning, reads the endpoints file beside it, whose endpoints serve every
// profile, and stands in the README.
func TestExamples(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for file, endpoints := range pairs(t) {
		if !strings.Contains(string(readme), "("+file+")") || !strings.Contains(string(readme), "("+endpoints+")") {
			t.Errorf("README.md lacks %s or %s", file, endpoints)
		}
		if _, warnings, err := app.Check(file); err != nil || len(warnings) > 0 {
			t.Errorf("%v, warnings %q", err, warnings)
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c, err := config.Load(file, text)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "{path: "+endpoints+",") {
			t.Errorf("%s does not read %s", file, endpoints)
		}
		for _, profile := range c.SchedulingProfiles {
			if !served(read(t, endpoints), profile.Name) {
				t.Errorf("%s has no endpoint for profile %s", endpoints, profile.Name)
			}
		}
	}
}

// pairs lists configurations with the endpoints file that belongs to each.
func pairs(t *testing.T) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".yaml"); ok && !strings.HasSuffix(name, "-endpoints") {
			out[e.Name()] = name + "-endpoints.yaml"
		}
	}
	if len(out) < 2 {
		t.Fatalf("%d examples", len(out))
	}
	return out
}

// read returns what a picker would make of an endpoints file.
func read(t *testing.T, file string) []datastore.Wanted {
	t.Helper()
	source, err := datastore.NewFile(datastore.FileOptions{Path: file, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all []datastore.Wanted
	if err := source.Run(ctx, func(wanted []datastore.Wanted) { all = wanted; cancel() }); err != nil {
		t.Fatal(err)
	}
	return all
}

func served(endpoints []datastore.Wanted, profile string) bool {
	phase := map[string]pool.Role{"encode": pool.RoleEncode, "prefill": pool.RolePrefill, "decode": pool.RoleDecode}[profile]
	for _, e := range endpoints {
		if phase != 0 && pool.ParseRole(e.Labels[pool.LabelRole]).Has(phase) {
			return true
		}
	}
	return false
}
