// SPDX-License-Identifier: Apache-2.0

// Package docs holds the documentation; its test keeps the documents true to the tree.
package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
)

var (
	// inlineCode is a word or path in backquotes.
	inlineCode = regexp.MustCompile("`([^`\n]+)`")
	// filePath is a path with a folder and an ending, such as scheduler/build.go.
	filePath = regexp.MustCompile(`^[\w.-]+(/[\w.-]+)+\.(go|yaml|tmpl|md|sh|json|prom)$`)
	// link is the target of a Markdown link.
	link = regexp.MustCompile(`\]\(([^)#\s]+)(#[^)\s]*)?\)`)
)

// TestTour checks that every file the tour names exists, and that it names enough of them to be a tour.
func TestTour(t *testing.T) {
	text := read(t, "tour.md")
	files := 0
	for _, m := range inlineCode.FindAllStringSubmatch(text, -1) {
		if !filePath.MatchString(m[1]) {
			continue
		}
		files++
		if _, err := os.Stat(filepath.Join("..", m[1])); err != nil {
			t.Errorf("tour.md names %s: %v", m[1], err)
		}
	}
	if files < 30 {
		t.Errorf("tour.md names %d files only", files)
	}
}

// TestFiles checks the files that CONTRIBUTING.md sends an author to.
func TestFiles(t *testing.T) {
	for _, m := range inlineCode.FindAllStringSubmatch(read(t, "../CONTRIBUTING.md"), -1) {
		if !filePath.MatchString(m[1]) {
			continue
		}
		if _, err := os.Stat(filepath.Join("..", m[1])); err != nil {
			t.Errorf("CONTRIBUTING.md names %s: %v", m[1], err)
		}
	}
}

// TestDesignDefaults checks that the block of Baton's own sections in design.md loads, and is what an empty file means.
func TestDesignDefaults(t *testing.T) {
	_, rest, found := strings.Cut(read(t, "design.md"), "```yaml\n")
	block, _, closed := strings.Cut(rest, "```")
	if !found || !closed {
		t.Fatal("design.md has no YAML block")
	}
	const head = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
	f := func(name, text string) *config.Config {
		c, err := config.Load(name, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	got, want := f("design.md", head+block), f("empty.yaml", head)
	if diff := cmp.Diff(want.Disaggregation, got.Disaggregation); diff != "" {
		t.Errorf("disaggregation (-default +design.md):\n%s", diff)
	}
	if diff := cmp.Diff(want.Limits, got.Limits); diff != "" {
		t.Errorf("limits (-default +design.md):\n%s", diff)
	}
	if diff := cmp.Diff(want.Scraping, got.Scraping); diff != "" {
		t.Errorf("scraping (-default +design.md):\n%s", diff)
	}
}

// TestLinks checks that links to files of the repository lead somewhere.
func TestLinks(t *testing.T) {
	documents, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"../*.md", "../*/*.md", "../*/*/*.md"} {
		more, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, more...)
	}
	for _, document := range documents {
		if strings.HasPrefix(document, "../.") {
			continue // downloads and tools
		}
		for _, m := range link.FindAllStringSubmatch(read(t, document), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(document), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", document, m[1], err)
			}
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
