package main

import (
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	f := func(name, in, wantLast string, wantOK bool) {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			s := newSummary(&out)
			if err := s.read(strings.NewReader(in)); err != nil {
				t.Fatal(err)
			}
			ok := s.finish()
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if last := lines[len(lines)-1]; last != wantLast || ok != wantOK {
				t.Errorf("got %q, %v; want %q, %v; output:\n%s", last, ok, wantLast, wantOK, out.String())
			}
		})
	}
	const (
		passA = `{"Action":"run","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"A"}
`
		passPkg = `{"Action":"pass","Package":"p","Elapsed":0.1}
`
		failPkg = `{"Action":"fail","Package":"p","Elapsed":0.1}
`
	)
	f("nothing ran", "", "0 passed, 0 failed", false)
	f("one passed", passA+passPkg, "1 passed, 0 failed", true)
	f("last line without newline", passA+strings.TrimSpace(passPkg), "1 passed, 0 failed", true)
	f("skip alone is no success", `{"Action":"skip","Package":"p","Test":"A"}
`+passPkg, "0 passed, 0 failed, 1 skipped", false)
	f("subtests are counted, their parent is not", `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/x"}
{"Action":"run","Package":"p","Test":"A/y"}
{"Action":"pass","Package":"p","Test":"A/x"}
{"Action":"fail","Package":"p","Test":"A/y"}
{"Action":"fail","Package":"p","Test":"A"}
`+failPkg, "1 passed, 1 failed", false)
	f("a parent that fails by itself counts", `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/x"}
{"Action":"pass","Package":"p","Test":"A/x"}
{"Action":"fail","Package":"p","Test":"A"}
`+failPkg, "1 passed, 1 failed", false)
	f("a package that does not build counts", `{"ImportPath":"p","Action":"build-output","Output":"p.go:1: bad\n"}
`+failPkg, "0 passed, 1 failed", false)
	f("no event is passed on", "ld: warning\n"+passA+passPkg, "1 passed, 0 failed", true)
}

func TestSummaryShowsFailuresOnly(t *testing.T) {
	var out strings.Builder
	s := newSummary(&out)
	in := `{"Action":"output","Package":"p","Test":"A","Output":"quiet\n"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"B","Output":"loud\n"}
{"Action":"fail","Package":"p","Test":"B"}
{"Action":"output","Package":"p","Test":"C","Output":"panic: unfinished\n"}
{"Action":"output","Package":"p","Test":"D","Output":"    d_test.go:3: needs a moon\n"}
{"Action":"skip","Package":"p","Test":"D"}
{"Action":"fail","Package":"p"}
`
	if err := s.read(strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	s.finish()
	got := out.String()
	for _, want := range []string{"loud", "panic: unfinished", "needs a moon"} {
		if !strings.Contains(got, want) {
			t.Errorf("output lacks %q:\n%s", want, got)
		}
	}
	if strings.Contains(got, "quiet") {
		t.Errorf("output of a passed test is shown:\n%s", got)
	}
}
