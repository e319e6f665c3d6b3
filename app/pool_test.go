// SPDX-License-Identifier: Apache-2.0

package app

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/baton-epp/baton/pool"
)

// TestSlotsAreForgottenEverywhere: whoever gets the slot of an endpoint that left is warm with nobody.
func TestSlotsAreForgottenEverywhere(t *testing.T) {
	s := &stack{t: t, dir: t.TempDir()}
	list := func(names ...string) {
		var text strings.Builder
		text.WriteString("endpoints:\n")
		for _, name := range names {
			fmt.Fprintf(&text, "- {name: %s, address: 127.0.0.1, port: %s}\n", name, map[string]string{"d": "1", "p": "2", "q": "3", "r": "4"}[name])
		}
		replaceFile(t, s.endpointsFile(), text.String())
	}
	list("d", "p", "q")
	a := s.startPicker(func(o *Options) {
		o.ConfigFile, o.EndpointsFile = "", filepath.Join(s.dir, "endpoints.yaml")
	}).app
	find := func(name string) *pool.Endpoint {
		for _, e := range a.Snapshot().Endpoints {
			if e.Name == name {
				return e
			}
		}
		return nil
	}
	d, p, q := find("d"), find("p"), find("q")
	d.Warm.Add(p.Slot)
	d.Warm.Add(q.Slot)
	list("d", "q")
	eventually(t, "p left", func() bool { return find("p") == nil && !d.Warm.Has(p.Slot) })
	list("d", "q", "r")
	eventually(t, "r came", func() bool { return find("r") != nil })
	if r := find("r"); r.Slot != p.Slot || d.Warm.Has(r.Slot) || !find("d").Warm.Has(q.Slot) {
		t.Errorf("r in slot %d, p was in %d: warm %v; with q %v", r.Slot, p.Slot, d.Warm.Has(r.Slot), d.Warm.Has(q.Slot))
	}
}
