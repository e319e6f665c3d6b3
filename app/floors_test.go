// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bufio"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module  = "github.com/baton-epp/baton"
	outside = -1 // of the floors: imports and is imported as its room says
)

// A room is the place of one package in the house.
type room struct {
	floor   int      // it may import every floor with a smaller number
	imports []string // what it may import besides, as path patterns; "*" ends one that names a whole tree
	users   []string // who may import a room that is outside of the floors
}

// floors is the plan of the house. A package that is not in it fails the test.
var floors = map[string]room{
	"cmd/baton": {floor: 7, imports: []string{"simulate*"}},

	"app": {floor: 6},

	"extproc": {floor: 5},

	"director": {floor: 4},

	"scorers":            {floor: 3},
	"filters":            {floor: 3},
	"pickers":            {floor: 3},
	"sidecar":            {floor: 3, imports: []string{"sidecar/connectors"}},
	"sidecar/connectors": {floor: 3},

	"scheduler": {floor: 2},

	"datastore":      {floor: 1},
	"metricsscraper": {floor: 1},
	"prefix":         {floor: 1},
	"admission":      {floor: 1},

	"pool":      {floor: 0},
	"inference": {floor: 0},
	"config":    {floor: 0},

	"scheduler/schedulertest": {floor: outside, imports: []string{"scheduler", "pool", "inference", "config", "internal/*"}},
	"simulate":                {floor: outside, imports: []string{"inference"}, users: []string{"cmd/*", "bench*"}},
	"bench":                   {floor: outside, imports: []string{"*"}},
	"manifests":               {floor: outside},
	"docs":                    {floor: outside},
	"internal":                {floor: outside, imports: []string{"*"}, users: []string{"internal/*", "bench*"}},
}

// trees are the rooms whose row holds for every package below them too.
var trees = []string{"simulate", "bench", "manifests", "docs", "internal"}

// thirdParty names modules that have one room each; bench is free to use all.
var thirdParty = map[string][]string{
	"github.com/envoyproxy/go-control-plane": {"extproc*", "bench*", "internal*"},
	"k8s.io/client-go":                       {"datastore*", "app*", "bench*"},
}

// forbidden are package names that say nothing about what lives inside.
var forbidden = []string{"utils", "common", "types", "helpers", "base", "core", "constants"}

// TestFloors reads the imports of every package: those of test files are free, since a test may use real neighbours.
func TestFloors(t *testing.T) {
	for dir, files := range packages(t) {
		name, r, ok := roomOf(dir)
		if !ok {
			t.Errorf("%s: unknown package: add it to the floors table in app/floors_test.go and a depguard rule in .golangci.yml", dir)
			continue
		}
		if slices.Contains(forbidden, path.Base(dir)) {
			t.Errorf("%s: forbidden package name: name it after the one thing it holds", dir)
		}
		for file, imports := range files {
			for _, imp := range imports {
				if why := refuse(dir, name, r, imp); why != "" {
					t.Errorf("%s imports %s: %s", file, imp, why)
				}
			}
		}
	}
}

// TestFloorsLinted keeps the linter's rules in step with the table: it only looks that each room is named there.
func TestFloorsLinted(t *testing.T) {
	rules, err := os.ReadFile("../.golangci.yml")
	if err != nil {
		t.Fatal(err)
	}
	for name, r := range floors {
		if r.floor > 0 && r.floor < 7 && !strings.Contains(string(rules), "pkg: "+module+"/"+name) {
			t.Errorf("%s: no depguard rule in .golangci.yml", name)
		}
	}
}

// TestFloorsRefuse plants bad imports, so that a hole in the check is seen.
func TestFloorsRefuse(t *testing.T) {
	f := func(dir, imp string, want bool) {
		t.Helper()
		name, r, ok := roomOf(dir)
		if got := !ok || refuse(dir, name, r, imp) != ""; got != want {
			t.Errorf("%s imports %s: refused = %v, want %v", dir, imp, got, want)
		}
	}
	f("scheduler", module+"/scorers", true)
	f("scheduler", module+"/pool", false)
	f("scorers", module+"/filters", true)
	f("scorers", module+"/scheduler", false)
	f("scorers", module+"/scheduler/schedulertest", true)
	f("sidecar", module+"/sidecar/connectors", false)
	f("sidecar/connectors", module+"/sidecar", true)
	f("datastore", module+"/metricsscraper", true)
	f("pool", module+"/inference", true)
	f("simulate", module+"/inference", false)
	f("simulate/page", module+"/simulate/wire", false)
	f("simulate", module+"/pool", true)
	f("app", module+"/simulate", true)
	f("app", module+"/extproc", false)
	f("director", module+"/internal/pooltest", true)
	f("director", module+"/app", true)
	f("cmd/baton", module+"/simulate", false)
	f("cmd/baton", module+"/bench", true)
	f("cmd/other", module+"/app", true)
	f("bench/farm", module+"/simulate", false)
	f("director", "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3", true)
	f("extproc", "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3", false)
	f("scheduler", "k8s.io/client-go/kubernetes", true)
	f("datastore", "k8s.io/client-go/kubernetes", false)
	f("scheduler", "net/http", false)
	f("wing", "net/http", true)
}

// refuse says why package dir, which lives in room r called name, may not import imp; "" when it may.
func refuse(dir, name string, r room, imp string) string {
	for third, rooms := range thirdParty {
		if (imp == third || strings.HasPrefix(imp, third+"/")) && !matches(rooms, dir) {
			return "only " + strings.Join(rooms, ", ") + " may"
		}
	}
	target, ours := strings.CutPrefix(imp, module+"/")
	if !ours || matches(r.imports, target) {
		return ""
	}
	targetName, to, ok := roomOf(target)
	switch {
	case !ok:
		return "that package is not in the floors table"
	case name == targetName && slices.Contains(trees, name):
		return ""
	case to.floor == outside && matches(to.users, dir):
		return ""
	case to.floor == outside:
		return "it is outside of the floors, for tests and for " + strings.Join(append(to.users, "nobody else"), ", ")
	case to.floor < r.floor:
		return ""
	case r.floor == outside:
		return fmt.Sprintf("%s may import only %v", name, r.imports)
	}
	return fmt.Sprintf("floor %d may import only floors with a smaller number, not %d", r.floor, to.floor)
}

func roomOf(dir string) (string, room, bool) {
	if r, ok := floors[dir]; ok {
		return dir, r, true
	}
	for _, tree := range trees {
		if strings.HasPrefix(dir, tree+"/") {
			return tree, floors[tree], true
		}
	}
	return "", room{}, false
}

// matches reports whether dir equals a pattern, or starts with one that ends in "*".
func matches(patterns []string, dir string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		tree, isTree := strings.CutSuffix(p, "*")
		return dir == p || isTree && strings.HasPrefix(dir, tree)
	})
}

// TestFileSizes caps test files at 500 lines that are neither blank nor comment; the linter caps all others at 300.
func TestFileSizes(t *testing.T) {
	const limit = 500
	for _, file := range goFiles(t) {
		if !strings.HasSuffix(file, "_test.go") {
			continue
		}
		if n := codeLines(t, file); n > limit {
			t.Errorf("%s has %d lines of code, limit %d: split it by subject", file, n, limit)
		}
	}
}

func codeLines(t *testing.T, file string) int {
	t.Helper()
	f, err := os.Open(filepath.Join("..", file))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		if line := strings.TrimSpace(sc.Text()); line != "" && !strings.HasPrefix(line, "//") {
			n++
		}
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// packages returns, per folder of the module that holds Go files, the imports of each file that is no test.
func packages(t *testing.T) map[string]map[string][]string {
	t.Helper()
	out := map[string]map[string][]string{}
	for _, file := range goFiles(t) {
		dir := path.Dir(file)
		if out[dir] == nil {
			out[dir] = map[string][]string{}
		}
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join("..", file), nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range parsed.Imports {
			imp, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			out[dir][file] = append(out[dir][file], imp)
		}
	}
	return out
}

// goFiles returns the path of every Go file of the module, relative to its root, with slashes.
func goFiles(t *testing.T) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := filepath.ToSlash(strings.TrimPrefix(p, ".."+string(filepath.Separator)))
		if d.IsDir() {
			if p != ".." && (strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "_") || d.Name() == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(rel, ".go") {
			files = append(files, rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
