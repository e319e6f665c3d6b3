// SPDX-License-Identifier: Apache-2.0

package filters_test

import (
	"testing"

	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/scheduler/schedulertest"
)

func TestContract(t *testing.T) {
	schedulertest.Contract(t, filters.Registry(), map[string]string{
		"by-label":                     "{label: a, validValues: [\"0\"]}",
		"by-label/absent":              "{label: none, allowsNoLabel: true}",
		"label-selector-filter/labels": "{matchLabels: {a: \"0\"}, matchExpressions: [{key: llm-d.ai/role, operator: In, values: [decode, both]}]}",
	})
}
