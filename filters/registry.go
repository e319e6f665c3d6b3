// SPDX-License-Identifier: Apache-2.0

package filters

import "github.com/baton-epp/baton/scheduler"

// Registry lists the filters by llm-d's type names.
func Registry() scheduler.Registry {
	return scheduler.Registry{
		"label-selector-filter": newLabelSelector,
		"by-label-selector":     scheduler.Deprecated(newLabelSelector, "use label-selector-filter"),
		"by-label":              scheduler.Deprecated(newByLabel, "use label-selector-filter"),
		"decode-filter":         newDecodeRole,
		"prefill-filter":        newPrefillRole,
		"encode-filter":         newEncodeRole,
	}
}
