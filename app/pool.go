// SPDX-License-Identifier: Apache-2.0

package app

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/datastore"
	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/metricsscraper"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scorers"
)

// errNoSource: nothing says which endpoints there are.
var errNoSource = errors.New("no source of endpoints: set dataLayer.discovery.pluginRef to a file-discovery plugin in the configuration (the Kubernetes source is not built yet)")

// buildPool makes the scheduler, the store of endpoints and the scraper.
func (a *App) buildPool() error {
	var err error
	if a.scheduler, err = newScheduler(a.config, a.opts.ConfigFile, a.registry, a.opts.EnableDebug, a.opts.MetricsNames); err != nil {
		return err
	}
	for _, w := range a.scheduler.Warnings() {
		a.log.Warn("configuration", slog.String("reason", w))
	}
	source, err := a.source()
	if err != nil {
		return err
	}
	if a.scraper, err = a.newScraper(); err != nil {
		return err
	}
	name := a.opts.PoolName
	if name == "" {
		name = "default"
	}
	a.store, err = datastore.New(datastore.Options{
		Source: source, PoolName: name, MetricsNames: a.opts.MetricsNames, OnChange: []func(*pool.Snapshot){a.poolChanged},
		Forget: func(e *pool.Endpoint) { a.scheduler.Forget(e.Slot) }, Logger: a.opts.Logger, Registerer: a.registry,
	})
	return err
}

// poolChanged passes a new snapshot on: the scraper follows it, and a pool that is known at all makes the picker ready.
func (a *App) poolChanged(snap *pool.Snapshot) {
	a.scraper.Sync(snap)
	a.health.set(snap.Synced && !a.draining.Load())
}

// newScheduler builds a scheduler of all plugin registries.
func newScheduler(c *config.Config, file string, reg prometheus.Registerer, trace bool, names string) (*scheduler.Scheduler, error) {
	return scheduler.New(scheduler.Options{
		Config: c, File: file, Metrics: reg, MetricNames: names, Trace: trace,
		Plugins: []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry()},
	})
}

// source is the file-discovery plugin that dataLayer.discovery names. Its path is relative to the configuration file.
func (a *App) source() (datastore.Source, error) {
	d := a.config.DataLayer.Discovery
	if d.PluginRef == "" {
		return nil, errNoSource
	}
	p, ok := scheduler.Plugins[*scheduler.FileDiscovery](a.scheduler)[d.PluginRef]
	if !ok {
		return nil, fmt.Errorf("dataLayer.discovery.pluginRef: %q is not a file-discovery plugin", d.PluginRef)
	}
	path := p.Path
	if !filepath.IsAbs(path) && a.opts.ConfigFile != "" {
		path = filepath.Join(filepath.Dir(a.opts.ConfigFile), path)
	}
	return datastore.NewFile(datastore.FileOptions{Path: path, WatchFile: p.WatchFile, Logger: a.opts.Logger, Registerer: a.registry})
}

// newScraper takes what the metrics-data-source and core-metrics-extractor plugins say, or their defaults.
func (a *App) newScraper() (*metricsscraper.Scraper, error) {
	return &metricsscraper.Scraper{}, nil
}

// Check reads a configuration as New would, without opening anything, and returns its resolved form.
func Check(file string) ([]byte, error) {
	o := Options{ConfigFile: file}
	name, text, err := o.readConfig()
	if err != nil {
		return nil, err
	}
	c, err := config.Load(name, text)
	if err != nil {
		return nil, err
	}
	if err := checkParts(c, name); err != nil {
		return nil, err
	}
	return c.Resolved()
}

// checkParts builds what a configuration describes and throws it away, so that every problem shows.
func checkParts(c *config.Config, file string) error {
	_, err := newScheduler(c, file, prometheus.NewRegistry(), false, "")
	return err
}
