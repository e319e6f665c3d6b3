// SPDX-License-Identifier: Apache-2.0

// Testsummary reads the events of go test -json on standard input and writes what a person wants to see: one progress
// line per package, the output of whatever failed, the reason of every skip, and a last line with the counts.
//
// It exits with 1 when anything failed or when nothing passed.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	s := newSummary(os.Stdout)
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
		os.Exit(1)
	}
	if !s.finish() {
		os.Exit(1)
	}
}

// event is one line of go test -json, as go doc test2json describes it.
type event struct {
	Action     string
	Package    string
	ImportPath string // of a package that is being built
	Test       string
	Output     string
	Elapsed    float64 // seconds
}

// key names one test, or a whole package when test is empty.
type key struct{ pkg, test string }

// counts of the tests of one package, or of all.
type counts struct{ passed, failed, skipped int }

type summary struct {
	out     io.Writer
	total   counts
	pkgs    map[string]*counts
	output  map[key][]string // of tests that have not ended yet
	parent  map[key]bool     // tests that have subtests: these are counted, not their parent
	failing map[key]bool     // parents of a failed subtest
	skips   []string
}

func newSummary(out io.Writer) *summary {
	return &summary{
		out:     out,
		pkgs:    map[string]*counts{},
		output:  map[key][]string{},
		parent:  map[key]bool{},
		failing: map[key]bool{},
	}
}

// read consumes events until r ends. Lines that are no events, such as a linker's complaint, are passed on.
func (s *summary) read(r io.Reader) error {
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadString('\n')
		if line != "" {
			var ev event
			if json.Unmarshal([]byte(line), &ev) == nil && ev.Action != "" {
				s.add(ev)
			} else {
				fmt.Fprintln(s.out, strings.TrimSuffix(line, "\n"))
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
	}
}

func (s *summary) add(ev event) {
	k := key{ev.Package, ev.Test}
	switch ev.Action {
	case "build-output":
		fmt.Fprint(s.out, ev.Output)
	case "run":
		if p, ok := k.up(); ok {
			s.parent[p] = true
		}
	case "output":
		s.output[k] = append(s.output[k], ev.Output)
	case "pass", "fail", "skip":
		if ev.Test == "" {
			s.endPackage(ev)
		} else {
			s.endTest(k, ev.Action)
		}
	}
}

// up returns the test that k is a subtest of.
func (k key) up() (key, bool) {
	i := strings.LastIndexByte(k.test, '/')
	if i < 0 {
		return key{}, false
	}
	return key{k.pkg, k.test[:i]}, true
}

func (s *summary) of(pkg string) *counts {
	c := s.pkgs[pkg]
	if c == nil {
		c = &counts{}
		s.pkgs[pkg] = c
	}
	return c
}

func (s *summary) endTest(k key, action string) {
	lines := s.output[k]
	delete(s.output, k)
	c := s.of(k.pkg)
	switch action {
	case "pass":
		if !s.parent[k] {
			c.passed++
		}
	case "skip":
		c.skipped++
		s.skips = append(s.skips, k.pkg+" "+k.test+": "+reason(lines))
	case "fail":
		if p, ok := k.up(); ok {
			s.failing[p] = true
		}
		if !s.failing[k] {
			c.failed++
		}
		fmt.Fprintf(s.out, "FAIL %s %s\n%s", k.pkg, k.test, strings.Join(lines, ""))
	}
}

// reason returns what a skipped test said, without the frame lines of go test.
func reason(lines []string) string {
	var said []string
	for _, l := range lines {
		l = strings.TrimSpace(l)
		if l != "" && !strings.HasPrefix(l, "=== ") && !strings.HasPrefix(l, "--- ") {
			said = append(said, l)
		}
	}
	return strings.Join(said, " ")
}

func (s *summary) endPackage(ev event) {
	c := s.of(ev.Package)
	if ev.Action == "fail" && c.failed == 0 {
		// It did not build, it panicked, or TestMain found something: no test carries the failure.
		c.failed++
	}
	if ev.Action == "fail" {
		s.printRest(ev.Package)
	}
	s.drop(ev.Package)
	delete(s.pkgs, ev.Package) // a package that is run again starts from zero
	s.total.passed += c.passed
	s.total.failed += c.failed
	s.total.skipped += c.skipped
	if *c == (counts{}) {
		return // no tests
	}
	word := "ok  "
	if ev.Action == "fail" {
		word = "FAIL"
	}
	fmt.Fprintf(s.out, "%s %-60s %4d tests %7.1f s\n", word, ev.Package, c.passed+c.failed+c.skipped, ev.Elapsed)
}

// printRest writes the output of a failed package that no ended test has claimed.
func (s *summary) printRest(pkg string) {
	for k, lines := range s.output {
		if k.pkg == pkg && k.test != "" {
			fmt.Fprintf(s.out, "FAIL %s %s (did not end)\n%s", pkg, k.test, strings.Join(lines, ""))
		}
	}
	fmt.Fprint(s.out, strings.Join(s.output[key{pkg, ""}], ""))
}

// drop forgets what was kept for a package that has ended.
func (s *summary) drop(pkg string) {
	for k := range s.output {
		if k.pkg == pkg {
			delete(s.output, k)
		}
	}
}

// finish writes the skips and the counts, and reports whether all is well.
func (s *summary) finish() bool {
	if len(s.skips) > 0 {
		fmt.Fprintln(s.out, "\nSKIPPED:")
		for _, l := range s.skips {
			fmt.Fprintln(s.out, "  "+l)
		}
	}
	fmt.Fprintf(s.out, "%d passed, %d failed", s.total.passed, s.total.failed)
	if s.total.skipped > 0 {
		fmt.Fprintf(s.out, ", %d skipped", s.total.skipped)
	}
	fmt.Fprintln(s.out)
	return s.total.failed == 0 && s.total.passed > 0
}
