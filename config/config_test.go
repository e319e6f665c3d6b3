// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite golden files")

func files(tb testing.TB, pattern string) map[string][]byte {
	tb.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(names) == 0 {
		tb.Fatalf("no %s: %v", pattern, err)
	}
	out := map[string][]byte{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			tb.Fatal(err)
		}
		out[filepath.Base(name)] = data
	}
	return out
}

func TestGoodFiles(t *testing.T) {
	for name, data := range files(t, "good-*.yaml") {
		t.Run(name, func(t *testing.T) {
			c, err := Load(name, data)
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.Resolved()
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", strings.TrimSuffix(name, ".yaml")+".golden")
			shown := strings.Join(append(c.Warnings, string(got)), "\n")
			if *update {
				if err := os.WriteFile(golden, []byte(shown), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), shown); diff != "" {
				t.Errorf("resolved form (-want +got):\n%s", diff)
			}
			again, err := Load("resolved", got)
			if err != nil {
				t.Fatalf("the resolved form does not load: %v", err)
			}
			twice, err := again.Resolved()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(got), string(twice)); diff != "" {
				t.Errorf("resolved twice (-once +twice):\n%s", diff)
			}
		})
	}
}

func TestBadFiles(t *testing.T) {
	for name, data := range files(t, "bad-*.yaml") {
		t.Run(name, func(t *testing.T) {
			first, _, _ := strings.Cut(string(data), "\n")
			want, ok := strings.CutPrefix(first, "# want: ")
			if !ok {
				t.Fatal("the first line does not say what is wanted")
			}
			c, err := Load(name, data)
			if err == nil || c != nil {
				t.Fatalf("loads: %v", c)
			}
			got := strings.ReplaceAll(err.Error(), "\n", "|")
			if name == "bad-syntax.yaml" { // the parser's own words
				if !strings.HasPrefix(got, want) {
					t.Errorf("got %s, want prefix %s", got, want)
				}
				return
			}
			if diff := cmp.Diff(strings.Split(want, "|"), strings.Split(got, "|")); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDefaultEqualsDesign(t *testing.T) {
	data, err := os.ReadFile("testdata/good-baton.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load("good-baton.yaml", data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), c, cmp.Comparer(func(a, b Parameters) bool { return a.Absent() && b.Absent() })); diff != "" {
		t.Errorf("the block of docs/design.md 5 is not the default (-default +block):\n%s", diff)
	}
	var refs []ProfilePlugin
	for _, p := range Default().SchedulingProfiles {
		refs = append(refs, p.Plugins...)
	}
	want := []ProfilePlugin{{"queue-scorer", 2, 0}, {"kv-cache-utilization-scorer", 2, 0}, {"prefix-cache-scorer", 3, 0}, {"max-score-picker", 1, 0}}
	if diff := cmp.Diff(want, refs); diff != "" {
		t.Errorf("default profile (-want +got):\n%s", diff)
	}
}

func TestGate(t *testing.T) {
	f := func(gates []string, name string, want bool) {
		t.Helper()
		if got := (&Config{FeatureGates: gates}).Gate(name); got != want {
			t.Errorf("gate %s of %v = %v, want %v", name, gates, got, want)
		}
	}
	f(nil, "flowControl", false)
	f(nil, "haPopulateNonLeaderDatastore", true)
	f([]string{"flowControl"}, "flowControl", true)
	f([]string{"flowControl=true", "flowControl=false"}, "flowControl", false)
	f(nil, "nothing", false)
}

func TestOldSections(t *testing.T) {
	data, err := os.ReadFile("testdata/good-older.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load("f", data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Source{{"metrics-data-source", []Ref{{"model-server-extractor"}}}}, c.DataLayer.Sources); diff != "" {
		t.Error(diff)
	}
	if d := c.FlowControl.SaturationDetector; *d.QueueDepthThreshold != 5 || *d.MetricsStalenessThreshold != 200*time.Millisecond {
		t.Errorf("saturation detector %+v", d)
	}
	if c.Plugins[0].Line != 8 || c.SchedulingProfiles[0].Plugins[1].Line != 22 || c.SchedulingProfiles[0].Plugins[1].Weight != 1 {
		t.Errorf("lines %+v", c)
	}
}

func TestSizeCap(t *testing.T) {
	if _, err := Load("big", make([]byte, MaxFileBytes+1)); err == nil {
		t.Error("a file above the cap loads")
	}
	_, err := Load("many", []byte("a: [\n"+strings.Repeat("- x: 1\n  y: 2\n", 400)))
	if err == nil {
		t.Error("loads")
	}
	var b strings.Builder
	b.WriteString("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n")
	for range 200 {
		b.WriteString("x" + b.String()[:1] + strings.Repeat("y", b.Len()%977) + ": 1\n")
	}
	_, err = Load("many", []byte(b.String()))
	joined, ok := errors.AsType[interface {
		error
		Unwrap() []error
	}](err)
	if !ok || len(joined.Unwrap()) != maxProblems+1 {
		t.Errorf("problems are not capped: %v", err)
	}
}

func TestDeepOrSlow(t *testing.T) {
	for _, text := range []string{
		strings.Repeat("[", 100_000),
		strings.Repeat("{a: ", 100_000),
		strings.Repeat("- ", 100_000) + "a",
		strings.Repeat("? ", 100_000) + "a",
		strings.Repeat("!!str ", 50_000) + "a",
		strings.Repeat("!a\n", 50_000) + "a",
		strings.Repeat("&a ", 50_000) + "a",
		`{"a": ` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + "}",
		// What the parser would take minutes for.
		"a: |\n " + strings.Repeat("\r", 100_000),
		"a: |\n " + strings.Repeat("\n", 100_000),
		"a: [" + strings.Repeat("a, ", 100_000) + "]",
		strings.Repeat("a: 1\n", 100_000),
		strings.Repeat("-\n", 100_000),
	} {
		if _, err := Parse("deep", []byte(text)); err == nil {
			t.Errorf("%.20s… loads", text)
		}
	}
}
