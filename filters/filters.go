// SPDX-License-Identifier: Apache-2.0

// Package filters holds the filters that a profile may name: each takes endpoints out of the race and says why. One
// file per filter; [Registry] lists them. Floor 3.
package filters

import (
	"github.com/baton-epp/baton/scheduler"
)

// keep moves the candidates that ok accepts to the front, in their order, and returns how many they are; the others
// stay behind them.
func keep(cands []scheduler.Candidate, ok func(c *scheduler.Candidate) bool) int {
	kept := 0
	for i := range cands {
		if !ok(&cands[i]) {
			continue
		}
		if i != kept {
			cands[kept], cands[i] = cands[i], cands[kept]
		}
		kept++
	}
	return kept
}
