"Package metadata comes from settings.ini, nbdev's one source of truth."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


def pairs(key):
    return cfg.get(key, '').split()


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=['blockem', 'blockem.*']), python_requires='>=' + cfg['min_python'],
    install_requires=pairs('requirements'), extras_require={'dev': pairs('dev_requirements')},
    entry_points={'console_scripts': cfg.get('console_scripts', '').split('\n'), 'nbdev': [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']},
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '',
    long_description_content_type='text/markdown', zip_safe=False, include_package_data=True)
