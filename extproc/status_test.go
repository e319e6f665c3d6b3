// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// TestEveryErrorHasAStatus lists the exported sentinels of the packages a request passes through: a new one needs a row
// in the table, or it would be answered as a bug of ours.
func TestEveryErrorHasAStatus(t *testing.T) {
	rows := map[string]bool{}
	table, err := parser.ParseFile(token.NewFileSet(), "status.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(table, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && strings.HasPrefix(sel.Sel.Name, "Err") {
			if pkg, ok := sel.X.(*ast.Ident); ok {
				rows[pkg.Name+"."+sel.Sel.Name] = true
			}
		}
		return true
	})
	for _, dir := range []string{"inference", "admission", "scheduler", "sidecar", "director"} {
		for _, name := range sentinels(t, dir) {
			if !rows[name] {
				t.Errorf("status.go has no row for %s", name)
			}
		}
	}
}

// sentinels are the exported Err… variables of a package.
func sentinels(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v, %d files", dir, err, len(files))
	}
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range f.Decls {
			g, ok := decl.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, spec := range g.Specs {
				if v, ok := spec.(*ast.ValueSpec); ok && strings.HasPrefix(v.Names[0].Name, "Err") {
					names = append(names, dir+"."+v.Names[0].Name)
				}
			}
		}
	}
	return names
}

func TestStatusOfWrappedErrors(t *testing.T) {
	for _, row := range statuses {
		if got := statusOf(fmt.Errorf("while testing: %w", row.err)); got != row.status {
			t.Errorf("%v: status %d %s, want %d %s", row.err, got.code, got.reason, row.code, row.reason)
		}
	}
	if got := statusOf(&sidecar.PhaseError{Phase: scheduler.PhaseEncode}); got != encodeFailed {
		t.Errorf("an encode phase that failed: %+v", got)
	}
	if got := statusOf(fmt.Errorf("decode: %w", &sidecar.PhaseError{Phase: scheduler.PhasePrefill, Endpoint: "10.0.0.7:8000"})); got != prefillFailed {
		t.Errorf("a phase error is answered %d %s", got.code, got.reason)
	}
	if got := statusOf(errors.New("anything")); got != internal {
		t.Errorf("an unknown error is answered %d", got.code)
	}
}

func TestInternalTextIsNotShown(t *testing.T) {
	m := immediateAnswer(internal, errors.New("secret 10.0.0.7"), inference.Chat)
	if body := string(m.GetImmediateResponse().GetBody()); strings.Contains(body, "10.0.0.7") || !strings.Contains(body, "internal-error") {
		t.Errorf("body %s", body)
	}
}
