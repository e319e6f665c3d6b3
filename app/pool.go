// SPDX-License-Identifier: Apache-2.0

package app

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/datastore"
	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/metricsscraper"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scorers"
	"github.com/baton-epp/baton/sidecar"
)

// errNoSource: nothing says which endpoints there are.
var errNoSource = errors.New("no source of endpoints: pass --endpoints-file, or name a file-discovery plugin in dataLayer.discovery.pluginRef of the configuration (the Kubernetes source is not built yet)")

// buildPool makes the scheduler, the store of endpoints and the scraper.
func (a *App) buildPool() error {
	var err error
	if a.scheduler, err = newScheduler(a.config, &a.opts, a.registry); err != nil {
		return err
	}
	a.warn(a.scheduler.Warnings())
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
		Forget: a.forget, Logger: a.opts.Logger, Registerer: a.registry,
	})
	return err
}

// poolChanged passes a new snapshot on: the scraper follows it, and a pool that is known at all makes the picker ready.
func (a *App) poolChanged(snap *pool.Snapshot) {
	a.scraper.Sync(snap)
	a.health.set(snap.Synced)
}

// forget drops what is known by the slot of an endpoint that left, before another one gets it.
func (a *App) forget(gone *pool.Endpoint) {
	a.scheduler.Forget(gone.Slot)
	a.store.Snapshot().ForgetSlot(gone.Slot)
}

// newScheduler builds a scheduler of all plugin registries.
func newScheduler(c *config.Config, o *Options, reg prometheus.Registerer) (*scheduler.Scheduler, error) {
	return scheduler.New(scheduler.Options{
		Config: c, File: o.ConfigFile, Metrics: reg, MetricNames: o.MetricsNames, Trace: o.EnableDebug,
		Plugins: []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry(), o.Plugins},
	})
}

// source is --endpoints-file, or the file-discovery plugin that dataLayer.discovery names: there a path is relative to
// the configuration file.
func (a *App) source() (datastore.Source, error) {
	ref := a.config.DataLayer.Discovery.PluginRef
	switch {
	case a.opts.EndpointsFile != "" && ref != "":
		return nil, errors.New("--endpoints-file and dataLayer.discovery: set one, not both")
	case a.opts.EndpointsFile != "":
		return datastore.NewFile(datastore.FileOptions{Path: a.opts.EndpointsFile, WatchFile: true, Logger: a.opts.Logger, Registerer: a.registry})
	case ref == "":
		return nil, errNoSource
	}
	o, err := fileDiscovery(a.config, ref)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(o.Path) && a.opts.ConfigFile != "" {
		o.Path = filepath.Join(filepath.Dir(a.opts.ConfigFile), o.Path)
	}
	o.Logger, o.Registerer = a.opts.Logger, a.registry
	return datastore.NewFile(o)
}

// fileDiscovery reads the parameters of the plugin named ref.
func fileDiscovery(c *config.Config, ref string) (datastore.FileOptions, error) {
	for i := range c.Plugins {
		if p := &c.Plugins[i]; p.Name == ref && p.Type == "file-discovery" {
			return datastore.DecodeFile(p.Parameters)
		}
	}
	return datastore.FileOptions{}, fmt.Errorf("dataLayer.discovery.pluginRef: %q is not a file-discovery plugin", ref)
}

// newScraper takes what the metrics-data-source and core-metrics-extractor plugins say, or their defaults.
func (a *App) newScraper() (*metricsscraper.Scraper, error) {
	source, engines, err := scraping(a.config)
	if err != nil {
		return nil, err
	}
	return metricsscraper.New(metricsscraper.Options{
		Scraping: a.config.Scraping, MinInterval: a.opts.RefreshMetricsInterval, Staleness: a.opts.MetricsStaleness,
		Source: source, Engines: engines, RefusedMeansNotReady: true, MetricsNames: a.opts.MetricsNames,
		Logger: a.opts.Logger, Registerer: a.registry,
	})
}

// scraping decodes the plugins that say where and how metrics are read.
func scraping(c *config.Config) (source metricsscraper.Source, engines *metricsscraper.Engines, err error) {
	source, engines = metricsscraper.DefaultSource(), metricsscraper.DefaultEngines()
	var errs []error
	for i := range c.Plugins {
		switch p := &c.Plugins[i]; p.Type {
		case "metrics-data-source":
			source, err = metricsscraper.DecodeSource(p.Parameters)
			errs = append(errs, err)
		case "core-metrics-extractor":
			engines, err = metricsscraper.DecodeEngines(p.Parameters)
			errs = append(errs, err)
		}
	}
	return source, engines, errors.Join(errs...)
}

// Check reads a configuration as New would, without opening a port, and returns its resolved form and what an operator
// should know about it.
func Check(file string) (resolved []byte, warnings []string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	c, err := config.Load(file, text)
	if err != nil {
		return nil, nil, err
	}
	warnings, err = checkParts(c, file, nil)
	if err != nil {
		return nil, nil, err
	}
	if c.DataLayer.Discovery.PluginRef == "" {
		warnings = append(warnings, file+": dataLayer.discovery is not set: baton serve needs --endpoints-file with it")
	}
	resolved, err = c.Resolved()
	return resolved, append(c.Warnings, warnings...), err
}

// inFile names the configuration in an error, or in each of a list, that does not.
func inFile(file string, err error) error {
	if err == nil || file == "" || strings.HasPrefix(err.Error(), file) {
		return err
	}
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		var named []error
		for _, e := range all.Unwrap() {
			named = append(named, inFile(file, e))
		}
		return errors.Join(named...)
	}
	return fmt.Errorf("%s: %w", file, err)
}

// checkParts builds what a configuration describes and throws it away, so that every problem shows. plugins are those that
// the program brings (Options.Plugins).
func checkParts(c *config.Config, file string, plugins scheduler.Registry) (warnings []string, err error) {
	reg, log := prometheus.NewRegistry(), slog.New(slog.DiscardHandler)
	sched, err := newScheduler(c, &Options{ConfigFile: file, Plugins: plugins}, reg)
	if err == nil {
		warnings = sched.Warnings()
	}
	errs := []error{err}
	source, engines, err := scraping(c)
	if err == nil {
		_, err = metricsscraper.New(metricsscraper.Options{Scraping: c.Scraping, Source: source, Engines: engines, Logger: log, Registerer: reg})
	}
	errs = append(errs, err)
	if ref := c.DataLayer.Discovery.PluginRef; ref != "" {
		_, err := fileDiscovery(c, ref)
		errs = append(errs, inFile(file, err))
	}
	_, err = sidecar.New(sidecar.Options{Config: c.Disaggregation, Snapshot: func() *pool.Snapshot { return pool.NewSnapshot(0, false, nil) }})
	warnings = append(warnings, sidecar.Warnings(&c.Disaggregation)...)
	return warnings, errors.Join(append(errs, inFile(file, err))...)
}
