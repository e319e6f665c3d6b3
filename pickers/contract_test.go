// SPDX-License-Identifier: Apache-2.0

package pickers_test

import (
	"testing"

	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/scheduler/schedulertest"
)

func TestContract(t *testing.T) {
	schedulertest.Contract(t, pickers.Registry(), map[string]string{
		"max-score-picker/three":       "{maxNumOfEndpoints: 3}",
		"random-picker/three":          "{maxNumOfEndpoints: 3}",
		"weighted-random-picker/three": "{maxNumOfEndpoints: 3}",
	})
}
