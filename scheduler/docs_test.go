// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// allTypes lists every registered plugin type.
func allTypes() []string {
	all, err := scheduler.Merge(append(registries(), scheduler.Builtin())...)
	if err != nil {
		return []string{err.Error()}
	}
	return slices.Sorted(maps.Keys(all))
}

// TestDocs: docs/plugins.md has one row per registered type, lists what is not built, and its examples load.
func TestDocs(t *testing.T) {
	raw, err := os.ReadFile("../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	built, missing, found := strings.Cut(text, "## Not built yet")
	if !found {
		t.Fatal(`no section "Not built yet"`)
	}
	var rows []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)`").FindAllStringSubmatch(built, -1) {
		rows = append(rows, m[1])
	}
	slices.Sort(rows)
	if diff := cmp.Diff(allTypes(), rows); diff != "" {
		t.Errorf("rows and registries differ (-registered +documented):\n%s", diff)
	}
	var listed []string
	for _, m := range regexp.MustCompile("`([a-z0-9-]+)`").FindAllStringSubmatch(missing, -1) {
		listed = append(listed, m[1])
	}
	slices.Sort(listed)
	want := slices.Sorted(slices.Values(scheduler.NotBuilt()))
	if diff := cmp.Diff(want, listed); diff != "" {
		t.Errorf("types not built (-code +documented):\n%s", diff)
	}
	for _, name := range allTypes() {
		if slices.Contains(want, name) {
			t.Errorf("%s is registered and listed as not built", name)
		}
	}
	for i, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(text, -1) {
		cfg, err := config.Load("plugins.md", []byte(m[1]))
		if err != nil {
			t.Errorf("example %d: %v", i+1, err)
			continue
		}
		load(t, "", func(o *scheduler.Options) { o.Config = cfg })
	}
}
